"""Batches of pairs of an image and a noise that stay the same for every timestep, checkpoint and batch size."""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import sharding
from dar_jax.config import encodes_online
from dar_jax.data.pipeline import train_iterator
from dar_jax.training.online import make_online_encoder


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
      {"image": float32 [B, H, W, C], "label": int32 [B], "index": int32 [B], "weight": float32 [B]}: `index` is the
      pair's number, from which its noise follows, and `weight` 1, or 0 for filling.
    """
    data = config.data.copy_and_resolve_references()
    data.update(train_split=chosen.split, flip=False, verify=False)
    online = encodes_online(config)
    batch_size = chosen.batch_size
    rows = sharding.local_rows(mesh, batch_size)
    iterator = train_iterator(
        data,
        channels=3 if online else config.model.channels,
        batch_size=batch_size,
        seed=config.seed,
        rows=rows,
    )
    encode = make_online_encoder(config, mesh) if online else None
    with closing(iterator):
        for start in range(0, chosen.num_images, batch_size):
            index = (start + rows).astype(np.int32)
            local = {**next(iterator), "index": index, "weight": (index < chosen.num_images).astype(np.float32)}
            batch = sharding.from_local_rows(mesh, batch_size, rows, local)
            if encode:
                batch["image"] = encode(batch["image"], start)
            yield batch


def noise(seed: int, index: Array, shape: tuple[int, ...]) -> Array:
    """N(0, 1) noise of the pairs `index` `[B]`, each of `shape`: float32 `[B, *shape]`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
