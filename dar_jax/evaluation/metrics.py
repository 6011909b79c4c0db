"""Two sets of images to a table of numbers: FID, sFID, KID, Inception score, precision and recall."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax.data.pipeline import image_batches
from dar_jax.errors import UserError
from dar_jax.evaluation.features import Features, extract_all
from dar_jax.evaluation.sampling import image_shape
from dar_jax.evaluation.sets import array_names, open_images, read_moments
from dar_jax.evaluation.statistics import (
    Accumulator,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

MAX_REFERENCE_IMAGES = 10_000  # for KID, precision and recall, and for a reference made on the way
READ_BATCH = 500


class FeatureSet(NamedTuple):
    """What the metrics need to know about a set of images.

    Attributes:
      moments: by features, "pool" and of the Inception network "spatial".
      pool: float32 [N, F], or None when only the moments are known.
      logits: float32 [N, classes] of the network's classifier, or None.
    """

    moments: dict[str, Statistics]
    pool: np.ndarray | None
    logits: np.ndarray | None


class Collector:
    """Turns features, batch by batch in the order of the images, into a `FeatureSet`.

    `keep_rows=False` keeps their moments only, for sets that would not fit in memory.
    """

    def __init__(self, keep_rows: bool = True):
        self.moments: dict[str, Accumulator] = {}
        self.rows: dict[str, list[np.ndarray]] = {"pool": [], "logits": []} if keep_rows else {}

    def add(self, features: dict[str, np.ndarray]) -> None:
        """Adds float32 [B, F] by name. Raises UserError if one is not finite."""
        for name, x in features.items():
            if name != "logits":
                self.moments.setdefault(name, Accumulator()).update(x)
            if name in self.rows:
                self.rows[name].append(x)

    def result(self) -> FeatureSet:
        """Of all images so far. Raises UserError if they are fewer than 2."""
        moments = {name: accumulator.statistics() for name, accumulator in self.moments.items()}
        rows = {name: np.concatenate(parts) for name, parts in self.rows.items() if parts}
        return FeatureSet(moments, rows.get("pool"), rows.get("logits"))


def read_reference(path: str, features: Features, mesh: Mesh, size: tuple[int, int]) -> FeatureSet:
    """The reference of an npz in the ADM layout: its stored moments, and the features of its first 10,000 images.

    Args:
      path: the npz. Without moments, or when `features` are not the Inception network's, they are made of its images.
      features: the feature network.
      mesh: the devices that run it.
      size: height and width of the images to be compared with it.

    Raises:
      UserError: the file is missing, damaged or of other arrays, sizes or numbers of features than are needed.
    """
    flag = "--reference"
    moments = read_moments(path, flag) if features.name == "inception" else {}
    for name, wanted in (("pool", 2048), ("spatial", 2023)):
        if name in moments and moments[name].mean.shape != (wanted,):
            raise UserError(
                f'{flag} = "{path}" has moments of {moments[name].mean.size} "{name}" features, but the Inception '
                f"network has {wanted}."
            )
    if "pool" in moments and "arr_0" not in array_names(path, flag):
        return FeatureSet(moments, None, None)
    images = open_images(path, flag)
    if images.shape[1:3] != size:
        raise UserError(
            f'{flag} = "{path}" has images of {images.shape[1]} x {images.shape[2]}, but they are compared with images '
            f"of {size[0]} x {size[1]}."
        )
    collector = Collector()
    for batch in images.batches(READ_BATCH, MAX_REFERENCE_IMAGES if "pool" in moments else None):
        collector.add(extract_all(features, batch, mesh))
    made = collector.result()
    return made._replace(moments=moments) if "pool" in moments else made


def split_images(config: ConfigDict, split: str, limit: int | None = MAX_REFERENCE_IMAGES) -> Iterator[np.ndarray]:
    """Yields the images of a split in batches, uint8 [b, S, S, C]: at most `limit` of them, evenly spaced."""
    batches = image_batches(config.data, split, channels=config.model.channels, batch_size=READ_BATCH, limit=limit)
    return (images for images, _ in batches)


def split_reference(config: ConfigDict, features: Features, mesh: Mesh) -> FeatureSet:
    """The reference that is made of at most 10,000 images of `config.data.eval_split`, evenly spaced."""
    collector = Collector()
    for batch in split_images(config, config.data.eval_split):
        collector.add(extract_all(features, batch, mesh))
    return collector.result()


def load_reference(config: ConfigDict, features: Features, mesh: Mesh) -> FeatureSet:
    """The reference of a run: `config.eval.reference`, else its held-out images."""
    if config.eval.reference:
        return read_reference(config.eval.reference, features, mesh, image_shape(config)[:2])
    return split_reference(config, features, mesh)


def score(features: Features, reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """The numbers that the two sets allow, the one that ranks models first.

    Of the Inception network: fid; sfid, if the reference has spatial moments; is; and if it has images kid,
    precision and recall. Of another network only "fd_<name>". Only the first process computes, all receive.
    """
    names = ["fid" if features.name == "inception" else f"fd_{features.name}"]
    if features.name == "inception":
        names += ["sfid"] if "spatial" in reference.moments else []
        names += ["is"] if reference.pool is None else ["is", "kid", "precision", "recall"]
    values = np.zeros(len(names))
    if jax.process_index() == 0:
        scores = {names[0]: frechet_distance(reference.moments["pool"], samples.moments["pool"])}
        if "sfid" in names:
            scores["sfid"] = frechet_distance(reference.moments["spatial"], samples.moments["spatial"])
        if "is" in names:
            scores["is"] = inception_score(samples.logits)
        if "kid" in names:
            pool = reference.pool[:MAX_REFERENCE_IMAGES]
            scores["kid"] = kernel_distance(pool, samples.pool[:MAX_REFERENCE_IMAGES])
            scores["precision"], scores["recall"] = precision_recall(pool, samples.pool)
        values = np.array([scores[name] for name in names])
    if jax.process_count() > 1:
        # As integers, because jax would make float32 of the float64.
        values = multihost_utils.broadcast_one_to_all(values.view(np.uint32)).view(np.float64)
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def warn_if_few(reference: FeatureSet, count: int, say: Callable[[str], None]) -> None:
    """Says so if `count` samples or the reference's own have a singular covariance, by which the distance is biased."""
    size, known = reference.moments["pool"].mean.size, reference.moments["pool"].count
    fewest = min(count, known or count)
    if fewest <= size:
        say(
            f"warning: {fewest} images are too few for {size} features: the Frechet distance is finite but biased "
            "upwards; compare it only with others of as many images (published ones take 50,000)"
        )
