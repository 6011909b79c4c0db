"""Canonical routing: what a routed model loses when its weights no longer depend on t, nor on the image.

The weights of every reader are fixed to their mean over images, tokens and times. Fixing them to their mean over images
and tokens alone, at each time, tells apart what hangs on t from what hangs on content.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax import objectives
from dar_jax.data.captions import to_sample
from dar_jax.diagnosis import pairs
from dar_jax.diagnosis.probes import make_velocity_loss
from dar_jax.evaluation.features import extract_all
from dar_jax.evaluation.in_training import load_features
from dar_jax.evaluation.metrics import Collector, load_reference, score, warn_if_few
from dar_jax.evaluation.sampling import make_sampler, sample_images
from dar_jax.logs import say
from dar_jax.models import SiT


def compare_canonical(
    config: ConfigDict,
    model: SiT,
    mesh: Mesh,
    params: dict,
    chosen: pairs.Pairs,
    weights: np.ndarray,
    workdir: str,
) -> dict:
    """Losses with fixed weights, and the metrics of `config.eval` of samples with and without.

    Args:
      params: of the routed `model`.
      chosen: pairs for the losses.
      weights: mean weights `[times, A, A]` over images and tokens, by reader and source, at the times of `chosen`.
      workdir: keeps the convnet of fd_convnet.

    Returns:
      {"weights": [A, A], the means over the times; "loss_content_blind": [times], at each time with its own mean;
      "loss": [times], with the mean over all; "num_samples", "scores_routed" and "scores": metrics by name, of the
      same noise and labels}. Without `config.eval.num_samples` there are no scores.
    """
    canonical, velocity_loss = weights.mean(axis=0), make_velocity_loss(config)

    def total_loss(params, batch, t, weights):
        frozen = model.clone(plain=True, frozen_weights=weights[..., None])

        def predict(x_t, t):
            return frozen.apply({"params": params}, x_t, t, batch["condition"]).prediction

        return (velocity_loss(predict, batch, t) * batch["weight"]).sum()

    total_loss = jax.jit(total_loss, out_shardings=NamedSharding(mesh, PartitionSpec()))
    say("canonical routing: losses")
    sums = np.zeros((2, len(chosen.times)))
    for batch in pairs.batches(config, chosen, mesh):
        for i, t in enumerate(chosen.times):
            at = np.full(chosen.batch_size, t, np.float32)
            sums[:, i] += [total_loss(params, batch, at, w.astype(np.float32)) for w in (weights[i], canonical)]
    content_blind, loss = sums / chosen.num_images
    result = {"weights": canonical, "loss_content_blind": content_blind, "loss": loss}
    if config.eval.num_samples:
        say(f"canonical routing: {config.eval.num_samples} samples with and without")
        features = load_features(config, mesh, workdir, say)
        reference = load_reference(config, features, mesh)
        warn_if_few(reference, config.eval.num_samples, say)
        settings = config.eval
        condition = to_sample(config, settings.num_samples).condition

        def scores(model: SiT) -> dict[str, float]:
            collector, draw = Collector(), make_sampler(config, objectives.build(config, model).sample, mesh)
            for images in sample_images(draw, params, condition, settings.batch_size, mesh):
                collector.add(extract_all(features, images, mesh))
            return score(features, reference, collector.result())

        result |= {"num_samples": settings.num_samples, "scores_routed": scores(model)}
        frozen = model.clone(plain=True, frozen_weights=canonical[..., None].astype(np.float32))
        result["scores"] = scores(frozen)
    return result
