"""Evaluation inside a run: a sample grid of the EMA, and its distance from the reference."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions
from dar_jax.data.pipeline import load_images
from dar_jax.errors import check_choice, require
from dar_jax.evaluation.features import Features, convnet_features, extract_all, inception_features
from dar_jax.evaluation.grid import save_grid
from dar_jax.evaluation.metrics import Collector, load_reference, score, warn_if_few
from dar_jax.evaluation.sampling import make_sampler, sample_images
from dar_jax.pretrained.inception import how_to_get

MAX_TRAINING_IMAGES = 20_000  # for the convnet, which learns in seconds


def load_features(config: ConfigDict, mesh: Mesh, workdir: str, log: Callable[[str], None]) -> Features:
    """The Inception network of `config.eval.inception`; without it, and with a line on how to get it, the convnet.

    Raises:
      UserError: the weights cannot be read, or there are none and the images are too large for the convnet.
    """
    if config.eval.inception:
        return inception_features(config.eval.inception, mesh)
    log(f"no FID without config.eval.inception, a convnet ranks the samples instead (fd_convnet). {how_to_get()}")
    images, labels = load_images(
        config.data, config.data.train_split, channels=config.model.channels, limit=MAX_TRAINING_IMAGES
    )
    cache = pathlib.Path(workdir) / "convnet.npz"
    return convnet_features(images, labels, config.model.num_classes, seed=0, cache=cache, log=log)


def check(settings: ConfigDict) -> None:
    """Raises UserError for the first field of `config.eval` that cannot work."""
    check_choice("config.eval.labels", settings.labels, conditions.ORDERS)
    require(settings.num_samples != 1, "config.eval.num_samples = 1 must be 0 (no metrics) or at least 2.")


class InlineEvaluation:
    """Draws the same samples (noise and conditions) at every call and compares them with the reference."""

    def __init__(self, config: ConfigDict, sample: Callable, mesh: Mesh, workdir: str, log: Callable[[str], None]):
        self.config, self.mesh, self.workdir, self.log = config, mesh, pathlib.Path(workdir), log
        self.draw, self.kind = make_sampler(config, sample, mesh), conditions.build(config.model)
        if config.eval.num_samples:
            self.features = load_features(config, mesh, workdir, log)
            self.reference = load_reference(config, self.features, mesh)
            warn_if_few(self.reference, config.eval.num_samples, log)

    def run(self, ema: dict, step: int) -> dict[str, float]:
        """Writes samples/<step>.png and returns the scores of `metrics.score`, {} when num_samples is 0.

        At the last step those of `config.eval.final_samples` follow, if they are more: {..., "fid_50000": ...}. The
        first grid_size^2 samples are the grid, row by row.
        """
        settings = self.config.eval
        grid_images, sizes = settings.grid_size**2, [settings.num_samples]
        if step == self.config.train.num_steps and settings.final_samples > settings.num_samples > 0:
            sizes.append(settings.final_samples)
        condition = self.kind.to_sample(max(*sizes, grid_images), settings.labels, self.config.seed)
        batches = sample_images(self.draw, ema, condition, settings.batch_size, self.mesh)
        grid, scores, collector, position = [], {}, Collector(), 0
        for images in _split_at(batches, (grid_images, *sizes)):
            position += len(images)
            if position <= grid_images:
                grid.append(images)
            if position <= sizes[-1]:
                collector.add(extract_all(self.features, images, self.mesh))
            if position in sizes:
                suffix = f"_{position}" if scores else ""
                found = score(self.features, self.reference, collector.result())
                scores |= {f"{name}{suffix}": value for name, value in found.items()}
        if jax.process_index() == 0:
            path = self.workdir / "samples" / f"{step:08d}.png"
            save_grid(path, np.concatenate(grid), columns=settings.grid_size)
        return scores


def _split_at(batches: Iterable[np.ndarray], stops: Sequence[int]) -> Iterator[np.ndarray]:
    """Cuts batches so that each of the counts `stops` is the end of one."""
    position = 0
    for batch in batches:
        yield from np.split(batch, sorted({n - position for n in stops if 0 < n - position < len(batch)}))
        position += len(batch)
