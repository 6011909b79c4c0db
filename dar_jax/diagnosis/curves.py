"""Diagnosis inside a run: the curves by depth and the entropy of routing, of the weights as they are trained."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax import diffusion
from dar_jax.diagnosis import pairs
from dar_jax.diagnosis.probes import averages, make_measure, relative_entropy, source_mask
from dar_jax.models import SiT


class InlineDiagnosis:
    """Measures the same few training images, noises and times at every call."""

    def __init__(self, config: ConfigDict, model: SiT, mesh: Mesh):
        count = config.diagnosis.num_images
        t0, t1 = diffusion.build(config.diffusion).prediction.time_range(sampling=True)
        # Midpoints: at the very end of the range gradients are ten times as large, and would be all there is to see.
        times = t0 + (t1 - t0) * (np.arange(count) + 0.5) / count
        chosen = pairs.Pairs(config.data.train_split, count, count, times)
        (self.batch,), self.t = pairs.batches(config, chosen, mesh), times.astype(np.float32)
        measure = make_measure(config, model)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.measure = jax.jit(lambda params, batch, t: measure(params, batch, t)[0], out_shardings=everywhere)
        self.mask = source_mask(model.depth, model.layout)

    def run(self, params: dict) -> dict[str, float]:
        """Returns forward_rms, backward_rms, similarity and, if there is one, alignment by block, as "forward_rms/01".

        Of a routed model also the entropy of each reader with a choice, relative to uniform weights, as
        "routing_entropy/02".
        """
        found = averages(jax.device_get(self.measure(params, self.batch, self.t)))
        scalars = {
            f"{name}/{k:02d}": float(value)
            for name in ("forward_rms", "backward_rms", "similarity", "alignment")
            if name in found
            for k, value in enumerate(found[name], start=1)
        }
        if "entropy" in found:
            entropy = relative_entropy(found["entropy"], self.mask)
            several = np.flatnonzero(self.mask.sum(axis=1) > 1)
            scalars |= {f"routing_entropy/{l + 1:02d}": float(entropy[l]) for l in several}
        return scalars
