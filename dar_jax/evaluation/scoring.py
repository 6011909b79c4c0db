"""Scores a run or a file of samples, and writes a reference: what the door `evaluate` does."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files, lock, objectives, sharding
from dar_jax.checkpoint import weights_fingerprint
from dar_jax.config import default
from dar_jax.data.captions import ToSample, to_sample
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.evaluation import detail
from dar_jax.evaluation.attributes import attribute_accuracy
from dar_jax.evaluation.features import Features, extract_all, inception_features
from dar_jax.evaluation.in_training import load_features
from dar_jax.evaluation.metrics import (
    MAX_REFERENCE_IMAGES,
    READ_BATCH,
    Collector,
    FeatureSet,
    load_reference,
    read_reference,
    score,
    split_images,
    warn_if_few,
)
from dar_jax.evaluation.sampling import image_shape, make_sampler, restore, sample_images
from dar_jax.evaluation.sets import MOMENT_KEYS, open_images, read_names, write_set
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
            measure = functools.partial(_extract, features, mesh)
            with _samples(config, ema, wanted, measure, settings, samples_out, mesh) as parts:
                collector = Collector()
                for part in parts:
                    collector.add(part)
                samples = collector.result() if jax.process_index() == 0 else None
                scores = score(features, reference, samples)
                if wanted.attributes and features.name == "convnet" and jax.process_index() == 0:
                    scores |= attribute_accuracy(samples.logits, wanted.labels, wanted.attributes)
                results.append({"scores": scores, "settings": settings})
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


def detail_of_run(
    config: ConfigDict, workdir: str, step: int | None, others: dict[str, str], samples_out: str | None
) -> list[dict]:
    """Measures the detail of `config.eval.num_samples` samples of a run's EMA beside real images and other samples.

    The arguments but `others` are those of `evaluate_run`, and so is what happens when it is stopped. Real images are
    those of `config.eval.reference`, else at most 10,000 of `config.data.eval_split`, evenly spaced.

    Args:
      others: names and npz files of other samples; "teacher" is what all sets are compared with as well.

    Returns:
      "reference", the others, and "samples", as `_Detail.results`.

    Raises:
      UserError: something does not fit, before anything is sampled.
    """
    if config.model.space == "latents" and not (config.data.vae and config.eval.reference):
        raise UserError(
            f"--workdir: the model makes latents of {config.model.channels} channels; to measure the detail of their "
            "images give --vae and --reference."
        )
    if samples_out:
        files.check_output(samples_out, "--samples_out", ".npz")
    sharding.fit(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    count, wanted = config.eval.num_samples, to_sample(config, config.eval.num_samples)
    with sharding.use(mesh):
        measured = _Detail("--workdir", image_shape(config)[:2], config.eval.inception, mesh)
        ema, step = restore(config, workdir, mesh, step)
        if config.eval.reference:
            measured.add_file(detail.REFERENCE, config.eval.reference, "--reference")
        else:
            real = split_images(config, config.data.eval_split)
            measured.add(detail.REFERENCE, map(measured.measure, real), {"data": config.data.to_dict()})
        measured.add_others(others, count, _names(wanted))
        settings = {**_settings(config, measured.features, workdir=workdir, step=step), "detail": True}
        with _samples(config, ema, wanted, measured.measure, settings, samples_out, mesh) as parts:
            measured.add("samples", parts, settings)
    return measured.results()


def detail_of_file(
    samples: str, reference: str, others: dict[str, str], inception: str, num_samples: int
) -> list[dict]:
    """Measures the detail of the first `num_samples` images of an npz; else as `detail_of_run`.

    Raises UserError if a file is missing, damaged or does not fit. `inception`, the converted weights, may be "".
    """
    shape = open_images(samples, "--samples").shape
    count = min(num_samples, shape[0])
    measured = _Detail("--samples", shape[1:3], inception, sharding.make_mesh(default().mesh))
    measured.add_file(detail.REFERENCE, reference, "--reference")
    measured.add_others(others, count, read_names(samples, "--samples"))
    measured.add_file("samples", samples, "--samples", count)
    return measured.results()


class _Detail:
    """Sets of images of one size, whose detail is compared.

    Args:
      flag: what the size follows from, for an error.
      size: height and width.
      inception: converted weights for patch FID, "" for none.
      mesh: the devices that run the Inception network.

    Raises UserError if the images are too small, or the weights cannot be read.
    """

    def __init__(self, flag: str, size: tuple[int, int], inception: str, mesh: Mesh):
        detail.check_size(size, flag)
        self.size, self.mesh, self.inception = size, mesh, inception
        self.not_available = detail.not_available(size, bool(inception))
        has_patches = "patch_fid" not in self.not_available
        self.features = inception_features(inception, mesh) if has_patches else None
        self.sets: dict[str, detail.Measured] = {}
        self.settings: dict[str, dict] = {}

    def measure(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What `detail.collect` joins, of uint8 [B, H, W, C]."""
        found = detail.per_image(images)
        if self.features is not None:
            found["patch"] = extract_all(self.features, detail.crop_patches(images), self.mesh)["pool"]
        return found

    def add(self, name: str, parts: Iterator[dict[str, np.ndarray]], settings: dict) -> None:
        """Adds a set by what `measure` found in its batches. Processes but the first may lack some, and keep none."""
        if jax.process_index() == 0:
            self.sets[name], self.settings[name] = detail.collect(parts, self.size), settings
        for _ in parts:  # all processes extract features together
            pass

    def add_file(self, name: str, path: str, flag: str, count: int | None = None) -> None:
        """Adds the first `count` images of an npz, by default all.

        Raises UserError if it is missing or damaged, of another size, or has fewer.
        """
        images = open_images(path, flag)
        if images.shape[1:3] != self.size:
            raise UserError(
                f'{flag} = "{path}" has images of {images.shape[1]} x {images.shape[2]}, but they are compared with '
                f"images of {self.size[0]} x {self.size[1]}."
            )
        if count is not None and images.shape[0] < count:
            raise UserError(
                f'{flag} = "{path}" has {images.shape[0]} images, but is compared with {count} samples; '
                f"give --num_samples={images.shape[0]}."
            )
        settings = {"path": path, "sha256": files.sha256(files.local(path)), "num_samples": count or images.shape[0]}
        self.add(name, map(self.measure, images.batches(READ_BATCH, count)), settings)

    def add_others(self, others: dict[str, str], count: int, names: np.ndarray | None) -> None:
        """Adds the first `count` images of npz files. Says which have other labels or captions than `names`."""
        for name, path in others.items():
            flag = "--teacher_samples" if name == detail.TEACHER else "--beside"
            self.add_file(name, path, flag, count)
            found = read_names(path, flag)
            if not (found is None or names is None or np.array_equal(found[:count], names[:count])):
                say(
                    f'warning: {flag} = "{path}" has other labels (arr_1) than the samples: the intervals '
                    "of their distance are not valid; draw both with the same seed and labels"
                )

    def results(self) -> list[dict]:
        """Of every set {"name", "scores", "intervals", ..., "not_available", "settings"}, see `detail.compare`.

        "not_available" gives the reason for each measure that the images do not allow. Only the first process has them.
        """
        if jax.process_index() > 0:
            return []
        if self.features is not None:
            reference = FeatureSet({"pool": self.sets[detail.REFERENCE].patches}, None, None)
            warn_if_few(reference, min(one.count for one in self.sets.values()), say)
        config = default()
        config.eval.inception = "" if self.features is None else self.inception
        common = _files(config, self.features)
        return [
            {"name": name, **one, "not_available": self.not_available, "settings": {**common, **self.settings[name]}}
            for name, one in detail.compare(self.sets).items()
        ]


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

    first = next(split_images(config, split, 2))  # fails before the network is compiled, if it must
    if count < 2:
        raise UserError(f'split "{split}" has {count} images, but a covariance needs at least 2.')
    features, collector = inception_features(config.eval.inception, mesh), Collector(keep_rows=False)
    for images in split_images(config, split, None):
        collector.add(extract_all(features, images, mesh))
    arrays = {}
    for name, keys in MOMENT_KEYS.items():
        moments = collector.moments[name].statistics()
        arrays.update(zip(keys, (moments.mean, moments.covariance), strict=True))
    if jax.process_index() == 0:
        shape = (min(count, MAX_REFERENCE_IMAGES), *first.shape[1:])
        write_set(path, shape, split_images(config, split, MAX_REFERENCE_IMAGES), arrays, "--write_reference")
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


def _extract(features: Features, mesh: Mesh, images: np.ndarray) -> dict[str, np.ndarray]:
    return extract_all(features, images, mesh)


def _names(wanted: ToSample) -> np.ndarray:
    """What an npz of samples holds as arr_1: captions, or labels int64 [N]."""
    return np.array(wanted.captions or wanted.labels.astype(np.int64))


@contextlib.contextmanager
def _samples(
    config: ConfigDict,
    ema: Any,
    wanted: ToSample,
    measure: Callable[[np.ndarray], dict[str, np.ndarray]],
    settings: dict,
    samples_out: str | None,
    mesh: Mesh,
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """Yields what `measure` finds in the samples of a run, batch by batch; what is already there is not drawn again.

    Processes but the first see only what is drawn now. When the block ends, the samples are written to `samples_out`,
    and what was kept for a continuation is removed.
    """
    shards = _Shards(files.path(settings["workdir"]) / "evaluation", settings, with_images=bool(samples_out))
    draw = make_sampler(config, objectives.build(config).sample, mesh)
    with shards.holding():
        yield _sample(draw, ema, wanted.condition, measure, shards, config.eval.batch_size, mesh)
        if samples_out and jax.process_index() == 0:
            count = config.eval.num_samples
            names = {"arr_1": _names(wanted)}
            write_set(samples_out, (count, *image_shape(config)), shards.images(count), names, "--samples_out")
        shards.remove()


def _sample(draw, ema: Any, condition: dict, measure: Callable, shards: "_Shards", batch_size: int, mesh: Mesh):
    """Yields what `measure` finds in the samples of `condition`; what `shards` already holds is not drawn again."""
    position, total = 0, conditions.length(condition)
    for stored in shards.stored(total):
        yield stored
        position += len(next(iter(stored.values())))
    if jax.process_count() > 1:  # the shards are the first process's, and all must draw the same
        position = int(multihost_utils.broadcast_one_to_all(np.int32(position)))
    if position:
        say(f"going on after {position} samples from {shards.directory}")
    per_shard = batch_size * -(-SHARD // batch_size)
    while position < total:
        stop = min(position + per_shard, total)
        until = jax.tree.map(lambda x: x[:stop], condition)  # noqa: B023
        images = np.concatenate(list(sample_images(draw, ema, until, batch_size, mesh, first=position)))
        found = measure(images)
        shards.write(position, found, images)
        yield found
        position = stop
        say(f"{position} of {total} samples")


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


def _files(config: ConfigDict, features: Features | None) -> dict:
    """Names and checksums of the files that a number depends on, and the versions of the libraries."""
    settings = {"versions": {name: importlib.metadata.version(name) for name in ("dar_jax", "jax")}}
    if features is not None:
        settings |= {"features": features.name, "features_sha256": features.fingerprint}
    for name in ("inception", "reference"):
        if path := config.eval[name]:
            settings[name], settings[f"{name}_sha256"] = path, files.sha256(files.local(path))
    return settings


def _settings(config: ConfigDict, features: Features | None, *, workdir: str, step: int) -> dict:
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
