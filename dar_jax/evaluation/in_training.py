"""Evaluation inside a run: a sample grid of the EMA, its distance from the reference, and the loss on held-out data."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files
from dar_jax.data.captions import ToSample, check_encoder, to_sample
from dar_jax.data.pipeline import load_images
from dar_jax.data.sources import Source, open_source
from dar_jax.errors import check_choice, require
from dar_jax.evaluation.attributes import attribute_accuracy
from dar_jax.evaluation.features import Features, convnet_features, extract_all, inception_features
from dar_jax.evaluation.grid import save_grid
from dar_jax.evaluation.metrics import Collector, load_reference, score, warn_if_few
from dar_jax.evaluation.sampling import make_sampler, sample_images
from dar_jax.evaluation.validation import ValidationLoss
from dar_jax.logs import read_metrics, say
from dar_jax.pretrained.inception import how_to_get

REPORT_SECONDS = 15  # between two lines that say how many samples are drawn
DISTANCES = ("fid", "fd_")  # how the first name of `metrics.score` begins
VALIDATION = "val_loss"  # how the names of the losses on held-out data begin
MAX_TRAINING_IMAGES = 20_000  # for the convnet, which learns in seconds


def load_features(config: ConfigDict, mesh: Mesh, workdir: str, log: Callable[[str], None]) -> Features:
    """The Inception network of `config.eval.inception`; without it, and with a line on how to get it, the convnet.

    Raises:
      UserError: the weights cannot be read, or there are none and the images are too large for the convnet, or without
        classes.
    """
    if config.eval.inception:
        return inception_features(config.eval.inception, mesh)
    source = open_source(config.data, config.data.train_split)
    check_classes(config, source)
    log(f"no FID without config.eval.inception, a convnet ranks the samples instead (fd_convnet). {how_to_get()}")
    images, labels = load_images(
        config.data, config.data.train_split, channels=config.model.channels, limit=MAX_TRAINING_IMAGES
    )
    num_classes = config.model.num_classes
    if config.model.family != "sit":  # whose labels are not the model's business
        num_classes = source.num_classes
    cache = files.path(workdir) / "convnet.npz"
    return convnet_features(images, labels, num_classes, seed=0, cache=cache, log=log)


def check_evaluation(config: ConfigDict, source: Source) -> None:
    """Raises UserError for what an evaluation would find out too late.

    Args:
      config: of the run, in which config.eval.every_steps is set.
      source: the training data.
    """
    if config.eval.num_samples:
        check_classes(config, source)
    kind = conditions.build(config.model)
    if not isinstance(kind, conditions.Labels):
        held_out = open_source(config.data, config.data.eval_split)
        require(
            not (config.eval.loss_images and getattr(held_out, "buckets", ())),
            f"config.eval.loss_images = {config.eval.loss_images} needs squares, but config.data.eval_split is "
            "prepared in buckets; prepare it without --buckets, or set loss_images = 0.",
        )
        kind.check_data(held_out)
        if isinstance(kind, conditions.Embeddings):
            check_encoder(config, held_out.texts, "config.data.eval_split")


def check_classes(config: ConfigDict, source: Source) -> None:
    """Raises UserError if the convnet, which learns to tell classes, is to score images without classes."""
    require(
        bool(config.eval.inception) or source.num_classes > 1,
        f"config.eval.num_samples = {config.eval.num_samples}: the images of config.data.source = {config.data.source} "
        "have no classes, which fd_convnet needs; set config.eval.inception, or num_samples = 0 to draw grids only.",
    )


def check(settings: ConfigDict) -> None:
    """Raises UserError for the first field of `config.eval` that cannot work."""
    check_choice("config.eval.labels", settings.labels, conditions.ORDERS)
    require(settings.num_samples != 1, "config.eval.num_samples = 1 must be 0 (no metrics) or at least 2.")


def is_due(config: ConfigDict, step: int) -> bool:
    """Whether a run evaluates after `step`."""
    every = config.eval.every_steps
    return every > 0 and step > 0 and (step % every == 0 or step == config.train.num_steps)


def is_evaluation(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is that of an evaluation: it has a score of it, or the step alone."""
    return set(line) == {"step"} or any(name.startswith((*DISTANCES, VALIDATION)) for name in line)


def unfinished(config: ConfigDict, workdir: str, steps: Sequence[int]) -> list[int]:
    """Those of `steps`, of the checkpoints, whose evaluation is due and did not finish; in all processes alike.

    An evaluation writes the grid, then best.json, and last its line of metrics.jsonl. Says which evaluations cannot be
    made up for, because their checkpoints are gone.
    """
    lines, folder = [line for line in read_metrics(workdir) if is_evaluation(line)], files.path(workdir)

    def is_logged(step: int) -> bool:
        names = {name for line in lines if line["step"] == step for name in line}
        if not config.eval.num_samples:
            return bool(names)
        sizes = _sizes(config, step)
        suffix = f"_{sizes[-1]}" if len(sizes) > 1 else ""
        return any(name.startswith(DISTANCES) and name.endswith(suffix) for name in names)

    has_best = config.eval.num_samples == 0 or (folder / "best.json").exists()
    found = [
        is_due(config, step)
        and not (has_best and is_logged(step) and (folder / "samples" / f"{step:08d}.png").exists())
        for step in steps
    ]
    if steps and jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(np.array(found))
    past = range(1, max(steps, default=0))
    if gone := [step for step in past if is_due(config, step) and step not in steps and not is_logged(step)]:
        say(f"steps without an evaluation, whose checkpoints are gone: {_listed(gone)}")
    return [step for step, missing in zip(steps, found, strict=True) if missing]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def _sizes(config: ConfigDict, step: int) -> list[int]:
    """The numbers of samples that are scored after `step`."""
    settings = config.eval
    is_last = step == config.train.num_steps
    more = [settings.final_samples] if is_last and settings.final_samples > settings.num_samples > 0 else []
    return [settings.num_samples, *more]


class InlineEvaluation:
    """Draws the same samples (noise and conditions) at every call and compares them with the reference."""

    def __init__(self, config: ConfigDict, sample: Callable, mesh: Mesh, workdir: str, log: Callable[[str], None]):
        self.config, self.mesh, self.workdir, self.log = config, mesh, files.path(workdir), log
        self.draw = make_sampler(config, sample, mesh)
        if config.eval.num_samples:
            self.features = load_features(config, mesh, workdir, log)
            self.reference = load_reference(config, self.features, mesh)
            warn_if_few(self.reference, config.eval.num_samples, log)
        self.validation = ValidationLoss(config, mesh) if config.eval.loss_images else None

    def run(self, ema: dict, step: int, params: dict | None = None) -> dict[str, float]:
        """Writes samples/<step>.png and returns the scores of `metrics.score`, {} when num_samples is 0.

        At the last step those of `config.eval.final_samples` follow, if they are more: {..., "fid_50000": ...}. Then
        come the losses on held-out data, if they are asked for: "val_loss" of the EMA, by time as "val_loss/t0.05", and
        "val_loss_raw" of the weights `params` that are averaged, if given. The first grid_size^2 samples are the grid,
        row by row.

        Where the data have attributes, their accuracy follows, of the captions of `config.data.eval_split` as
        "accuracy/tone", and of as many of `config.data.train_split` with the same labels as "accuracy_seen/tone".
        """
        settings, sizes = self.config.eval, _sizes(self.config, step)
        grid_images = settings.grid_size**2
        total, reported = max(*sizes, grid_images), time.monotonic()
        wanted = to_sample(self.config, total)
        batches = sample_images(self.draw, ema, wanted.condition, settings.batch_size, self.mesh)
        grid, scores, collector, position = [], {}, Collector(), 0
        for images in _split_at(batches, (grid_images, *sizes)):
            position += len(images)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                self.log(f"step {step}: {position} of {total} samples")
            if position <= grid_images:
                grid.append(images)
            if position <= sizes[-1]:
                collector.add(extract_all(self.features, images, self.mesh))
            if position in sizes:
                suffix = f"_{position}" if scores else ""
                samples = collector.result()
                found = score(self.features, self.reference, samples)
                scores |= {f"{name}{suffix}": value for name, value in found.items()}
        if jax.process_index() == 0:
            path, captions = self.workdir / "samples" / f"{step:08d}.png", wanted.captions
            captions = captions and captions[:grid_images]
            save_grid(path, np.concatenate(grid), columns=settings.grid_size, captions=captions)
        if scores and wanted.attributes and self.features.name == "convnet":
            scores |= self._accuracies(ema, samples.logits, wanted)
        return scores | self._validate(ema, params)

    def _accuracies(self, ema: dict, logits: np.ndarray, wanted: ToSample) -> dict[str, float]:
        count = len(logits)
        found = attribute_accuracy(logits, wanted.labels[:count], wanted.attributes)
        seen = to_sample(self.config, count, self.config.data.train_split, wanted.labels[:count])
        batches = sample_images(self.draw, ema, seen.condition, self.config.eval.batch_size, self.mesh)
        parts = [extract_all(self.features, images, self.mesh)["logits"] for images in batches]
        found_seen = attribute_accuracy(np.concatenate(parts), seen.labels, seen.attributes)
        return found | {name.replace("accuracy", "accuracy_seen"): value for name, value in found_seen.items()}

    def _validate(self, ema: dict, params: dict | None) -> dict[str, float]:
        if self.validation is None:
            return {}
        mean, by_bucket = self.validation.run(ema)
        found = {VALIDATION: mean}
        if params is not None:
            found[f"{VALIDATION}_raw"] = self.validation.run(params)[0]
        times = (np.arange(len(by_bucket)) + 0.5) / len(by_bucket)
        return found | {f"{VALIDATION}/t{t:.2f}": float(loss) for t, loss in zip(times, by_bucket, strict=True)}


def _split_at(batches: Iterable[np.ndarray], stops: Sequence[int]) -> Iterator[np.ndarray]:
    """Cuts batches so that each of the counts `stops` is the end of one."""
    position = 0
    for batch in batches:
        yield from np.split(batch, sorted({n - position for n in stops if 0 < n - position < len(batch)}))
        position += len(batch)
