"""Batches of pairs of an image and a noise that stay the same for every timestep, checkpoint and batch size."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax.data.feed import image_size, open_batches
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.logs import say
from dar_jax.objectives import repa


class Pairs(NamedTuple):
    """Which pairs are measured, and when.

    Attributes:
      split: of `config.data`.
      num_images: at most the size of the split, or images recur.
      batch_size: images at a time over all devices.
      times: float64 [N], t of each measurement.
    """

    split: str
    num_images: int
    batch_size: int
    times: np.ndarray


def batches(config: ConfigDict, chosen: Pairs, mesh: Mesh) -> Iterator[dict[str, Array]]:
    """Yields the examples in a fixed random order, spread over all devices.

    Images are not flipped, and latents are drawn from their distribution. The last batch is filled up with examples of
    weight 0.

    Yields:
      Batches as in `data.feed` with "index" int32 [B], the pair's number, from which its noise follows, and "weight"
      float32 [B], 1, or 0 for filling. If the model is aligned with features of the images (config.repa), they are
      "target" [B, T, F]; a line says so if they cannot be had.
    """
    config = config.copy_and_resolve_references()
    config.data.update(train_split=chosen.split, buckets=(), flip=False, verify=False)
    features = _features(config, mesh)

    def extra(step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        index = (step * chosen.batch_size + rows).astype(np.int32)
        return {"index": index, "weight": (index < chosen.num_images).astype(np.float32)}

    count = -(-chosen.num_images // chosen.batch_size)
    with open_batches(config, mesh, batch_size=chosen.batch_size, extra=extra) as endless:
        for batch in itertools.islice(endless, count):
            yield {**batch, "target": features(batch)} if features else batch


def _features(config: ConfigDict, mesh: Mesh) -> Callable[[dict], Array] | None:
    """`repa.make_features`; without weights or images the alignment is taken out of `config`."""
    try:
        if repa.needs_images(config) and config.data.source == "latents":
            open_source(config.data, config.data.train_split).check_images(image_size(config))
        return repa.make_features(config, mesh)
    except UserError as error:
        say(f"the alignment is not measured: {error}")
        config.repa.target = "none"
        return None


def noise(seed: int, index: Array, shape: tuple[int, ...]) -> Array:
    """N(0, 1) noise of the pairs `index` `[B]`, each of `shape`: float32 `[B, *shape]`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
