"""Evaluation inside a run: a sample grid and a Frechet distance between EMA samples and held-out images."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax.data.pipeline import load_images
from dar_jax.evaluation.features import convnet_features
from dar_jax.evaluation.grid import save_grid
from dar_jax.evaluation.sampling import make_sampler, sample_images
from dar_jax.evaluation.statistics import Accumulator, frechet_distance
from dar_jax.models import SiT

MAX_TRAINING_IMAGES = 20_000  # for the feature network, which learns in seconds
MAX_REFERENCE_IMAGES = 10_000


class InlineEvaluation:
    """Draws the same samples (noise and labels) at every call and compares them with `data.eval_split`."""

    def __init__(self, config: ConfigDict, model: SiT, mesh: Mesh, workdir: str, log: Callable[[str], None]):
        self.config, self.mesh, self.workdir = config, mesh, pathlib.Path(workdir)
        self.draw = make_sampler(config, model, mesh)
        if not config.eval.num_samples:
            return

        def load(split, limit):
            return load_images(config.data, split, channels=model.channels, limit=limit)

        images, labels = load(config.data.train_split, MAX_TRAINING_IMAGES)
        self.features = convnet_features(
            images, labels, model.num_classes, seed=0, cache=self.workdir / "convnet.npz", log=log
        )
        images, _ = load(config.data.eval_split, MAX_REFERENCE_IMAGES)
        self.reference = self._statistics(images)

    def _statistics(self, images: np.ndarray):
        accumulator = Accumulator()
        for start in range(0, len(images), 500):
            accumulator.update(np.asarray(self.features.extract(images[start : start + 500])))
        return accumulator.statistics()

    def run(self, ema: dict, step: int) -> dict[str, float]:
        """Writes samples/<step>.png and returns {"fd_<features>": distance}, or {} when num_samples is 0.

        Sample i has label i % num_classes; the first grid_size^2 of them are the grid, row by row.
        """
        grid_size, num_samples = self.config.eval.grid_size, self.config.eval.num_samples
        labels = np.arange(max(num_samples, grid_size**2)) % self.config.model.num_classes
        images = sample_images(self.draw, ema, labels, self.config.eval.batch_size, self.mesh)
        images = np.concatenate(list(images))
        if jax.process_index() == 0:
            save_grid(self.workdir / "samples" / f"{step:08d}.png", images[: grid_size**2], columns=grid_size)
        if not num_samples:
            return {}
        return {f"fd_{self.features.name}": frechet_distance(self.reference, self._statistics(images[:num_samples]))}
