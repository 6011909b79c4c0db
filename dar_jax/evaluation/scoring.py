"""Scores a run or a file of samples, and writes a reference: what the door `evaluate` does."""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files, lock, objectives, sharding
from dar_jax.checkpoint import weights_fingerprint
from dar_jax.config import default
from dar_jax.data.captions import to_sample
from dar_jax.data.pipeline import image_batches
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.evaluation.attributes import attribute_accuracy
from dar_jax.evaluation.features import Features, extract_all, inception_features
from dar_jax.evaluation.in_training import load_features
from dar_jax.evaluation.metrics import (
    MAX_REFERENCE_IMAGES,
    READ_BATCH,
    Collector,
    load_reference,
    read_reference,
    score,
    warn_if_few,
)
from dar_jax.evaluation.sampling import image_shape, make_sampler, restore, sample_images
from dar_jax.evaluation.sets import MOMENT_KEYS, open_images, write_set
from dar_jax.logs import say
from dar_jax.pretrained.inception import how_to_get
from dar_jax.pretrained.vae import read_header

SHARD = 1000  # samples between two points from which a stopped evaluation goes on


def evaluate_run(
    config: ConfigDict, workdir: str, step: int | None, cfg_scales: list[float], samples_out: str | None
) -> list[dict]:
    """Scores `config.eval.num_samples` samples of a run's EMA once for each guidance scale.

    Sample i depends on `config.seed` and i alone. Features are kept in workdir/evaluation/ until the numbers are
    there, and the same call goes on where it was stopped.

    Args:
      config: of the run, with the sampler, seed and `config.eval` of this evaluation; it has passed `validate`.
      workdir: the run.
      step: its checkpoint, None for the latest.
      cfg_scales: guidance scales.
      samples_out: an .npz to write the samples and labels to, for one scale only.

    Returns:
      For each scale {"scores": {name: value}, "settings": {...}}, all that affects the numbers.

    Raises:
      UserError: something does not fit, before anything is sampled.
    """
    if config.model.space == "latents" and not (config.data.vae and config.eval.inception and config.eval.reference):
        raise UserError(
            f"--workdir: the model makes latents of {config.model.channels} channels; to score them give --vae, "
            "--inception and --reference."
        )
    if samples_out:
        files.check_output(samples_out, "--samples_out", ".npz")
        if len(cfg_scales) > 1:
            raise UserError("--samples_out takes one guidance scale; leave out --cfg_sweep.")
    sharding.fit(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    wanted = to_sample(config, config.eval.num_samples)
    results = []
    with sharding.use(mesh):
        ema, step = restore(config, workdir, mesh, step)
        features = load_features(config, mesh, workdir, say)
        reference = load_reference(config, features, mesh)
        warn_if_few(reference, config.eval.num_samples, say)
        for scale in cfg_scales:
            config.sampler.cfg_scale = scale
            settings = _settings(config, features, workdir=workdir, step=step)
            shards = _Shards(files.path(workdir) / "evaluation", settings, with_images=bool(samples_out))
            draw = make_sampler(config, objectives.build(config).sample, mesh)
            with shards.holding():
                samples = _sample(draw, ema, wanted.condition, features, shards, config.eval.batch_size, mesh)
                scores = score(features, reference, samples)
                if wanted.attributes and features.name == "convnet" and jax.process_index() == 0:
                    scores |= attribute_accuracy(samples.logits, wanted.labels, wanted.attributes)
                results.append({"scores": scores, "settings": settings})
                if samples_out and jax.process_index() == 0:
                    count, others = (
                        config.eval.num_samples,
                        {"arr_1": np.array(wanted.captions or wanted.labels.astype(np.int64))},
                    )
                    write_set(samples_out, (count, *image_shape(config)), shards.images(count), others, "--samples_out")
                shards.remove()
    return results


def evaluate_file(samples: str, reference: str, inception: str, num_samples: int) -> dict:
    """Scores the first `num_samples` images of an npz against a reference npz; returns as `evaluate_run` does.

    Raises UserError if a file is missing, damaged or does not fit, or `inception`, the converted weights, is "".
    """
    images = open_images(samples, "--samples")
    if not inception:
        raise UserError(f"--inception is required with --samples. {how_to_get()}")
    mesh = sharding.make_mesh(default().mesh)
    features = inception_features(inception, mesh)
    against = read_reference(reference, features, mesh, images.shape[1:3])
    count = min(num_samples, images.shape[0])
    warn_if_few(against, count, say)
    collector = Collector()
    for batch in images.batches(READ_BATCH, count):
        collector.add(extract_all(features, batch, mesh))
    config = default()
    config.eval.update(inception=inception, reference=reference, num_samples=count)
    settings = {
        "samples": samples,
        "samples_sha256": files.sha256(files.local(samples)),
        **_files(config, features),
        "num_samples": count,
    }
    return {"scores": score(features, against, collector.result()), "settings": settings}


def write_reference(config: ConfigDict, split: str, path: str) -> int:
    """Writes the reference of a whole split in the ADM layout, and returns the number of its images.

    mu, sigma, mu_s and sigma_s are of all images, arr_0 holds at most 10,000 of them, evenly spaced.

    Raises:
      UserError: the config, the split or the output does not fit, or `config.eval.inception` is missing.
    """
    files.check_output(path, "--write_reference", ".npz")
    if not config.eval.inception:
        raise UserError(f"--inception is required to write a reference. {how_to_get()}")
    mesh = sharding.make_mesh(default().mesh)
    count = len(open_source(config.data, split))

    def batches(limit: int | None = None) -> Iterator[np.ndarray]:
        found = image_batches(config.data, split, channels=config.model.channels, batch_size=READ_BATCH, limit=limit)
        return (images for images, _ in found)

    first = next(batches(2))  # fails before the network is compiled, if it must
    if count < 2:
        raise UserError(f'split "{split}" has {count} images, but a covariance needs at least 2.')
    features, collector = inception_features(config.eval.inception, mesh), Collector(keep_rows=False)
    for images in batches():
        collector.add(extract_all(features, images, mesh))
    arrays = {}
    for name, keys in MOMENT_KEYS.items():
        moments = collector.moments[name].statistics()
        arrays.update(zip(keys, (moments.mean, moments.covariance), strict=True))
    if jax.process_index() == 0:
        shape = (min(count, MAX_REFERENCE_IMAGES), *first.shape[1:])
        write_set(path, shape, batches(MAX_REFERENCE_IMAGES), arrays, "--write_reference")
    return count


def table(results: list[dict]) -> str:
    """The scores of several results, a row each, led by the guidance scale if they have one."""
    names = list(results[0]["scores"])
    guided = "sampler" in results[0]["settings"]
    lines = ["".join(f"{name:>12}" for name in (["cfg_scale"] if guided else []) + names)]
    for result in results:
        values = [result["settings"]["sampler"]["cfg_scale"]] if guided else []
        lines.append("".join(f"{value:12.5g}" for value in [*values, *result["scores"].values()]))
    return "\n".join(lines)


def _sample(draw, ema: Any, condition: dict, features: Features, shards: "_Shards", batch_size: int, mesh: Mesh):
    """The `FeatureSet` of the samples of `condition`; what `shards` already holds is not drawn again."""
    collector, position, total = Collector(), 0, conditions.length(condition)
    for stored in shards.stored(total):
        collector.add(stored)
        position += len(stored["pool"])
    if jax.process_count() > 1:  # the shards are the first process's, and all must draw the same
        position = int(multihost_utils.broadcast_one_to_all(np.int32(position)))
    if position:
        say(f"going on after {position} samples from {shards.directory}")
    per_shard = batch_size * -(-SHARD // batch_size)
    while position < total:
        stop = min(position + per_shard, total)
        until = jax.tree.map(lambda x: x[:stop], condition)  # noqa: B023
        images = np.concatenate(list(sample_images(draw, ema, until, batch_size, mesh, first=position)))
        found = extract_all(features, images, mesh)
        shards.write(position, found, images)
        collector.add(found)
        position = stop
        say(f"{position} of {total} samples")
    return collector.result() if jax.process_index() == 0 else None


class _Shards:
    """Features, and on request images, of consecutive samples in files named by the first of them."""

    def __init__(self, parent: files.Path, settings: dict, with_images: bool):
        # Samples and features depend on neither their number, the reference nor the place of the weights.
        others = ("num_samples", "reference", "reference_sha256", "workdir", "step")
        identity = {"images": with_images, **{key: value for key, value in settings.items() if key not in others}}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.directory, self.with_images = parent / digest[:16], with_images

    def holding(self) -> contextlib.AbstractContextManager:
        """The lock of these files. Raises UserError if the same evaluation is under way elsewhere."""
        path = self.directory.with_suffix(".lock")
        return lock.holding(path, f"evaluation {self.directory}", "wait for its end, or take another seed")

    def _parts(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The first sample and the arrays of each file, up to the first file that is missing or damaged."""
        position = 0
        while (path := self.directory / f"{position:08d}.npz").exists():
            try:
                with path.open("rb") as content, np.load(content) as file:
                    arrays = dict(file)
                count = int(arrays.pop("count"))
            except Exception as error:  # a damaged file fails in many ways, and the cure is the same for all
                say(f"{path} is damaged ({type(error).__name__}): its samples are drawn again")
                return
            yield position, arrays
            position += count

    def stored(self, limit: int) -> Iterator[dict[str, np.ndarray]]:
        """Features of samples 0, 1, ..., shard by shard, up to `limit`; nothing in any process but the first."""
        if jax.process_index() == 0:
            for position, arrays in self._parts():
                if position < limit:
                    yield {name: x[: limit - position] for name, x in arrays.items() if name != "images"}

    def images(self, limit: int) -> Iterator[np.ndarray]:
        for position, arrays in self._parts():
            yield arrays["images"][: max(limit - position, 0)]

    def write(self, position: int, features: dict[str, np.ndarray], images: np.ndarray) -> None:
        if jax.process_index() == 0:
            self.directory.mkdir(exist_ok=True)
            arrays = {**features, "count": np.int64(len(images)), **({"images": images} if self.with_images else {})}
            path = self.directory / f"{position:08d}.npz"
            with files.replacing(path, only_writer=True) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)

    def remove(self) -> None:
        if jax.process_index() == 0:
            files.remove_tree(self.directory)


def _files(config: ConfigDict, features: Features) -> dict:
    """Names and checksums of the files that a number depends on, and the versions of the libraries."""
    versions = {name: importlib.metadata.version(name) for name in ("dar_jax", "jax")}
    settings = {"features": features.name, "features_sha256": features.fingerprint, "versions": versions}
    for name in ("inception", "reference"):
        if path := config.eval[name]:
            settings[name], settings[f"{name}_sha256"] = path, files.sha256(files.local(path))
    return settings


def _settings(config: ConfigDict, features: Features, *, workdir: str, step: int) -> dict:
    """All that affects the scores of a run."""
    reference = {} if config.eval.reference else {"reference": {"data": config.data.to_dict()}}
    return {
        "workdir": str(files.path(workdir)),
        "step": step,
        "weights_sha256": weights_fingerprint(workdir, step),
        "num_samples": config.eval.num_samples,
        "labels": config.eval.labels,
        "seed": config.seed,
        "sampler": config.sampler.to_dict(),
        "diffusion": config.diffusion.to_dict(),
        "model": config.model.to_dict(),
        "vae": config.data.vae and read_header(config.data.vae, "config.data.vae")["fingerprint"],
        **reference,
        **_files(config, features),
    }
