"""The loss on held-out data, at the same images, noises and times in every call."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax import diffusion, models, sharding
from dar_jax.data.feed import open_batches

BUCKETS = 10  # parts of the range of times; every image has a time in each
STREAM = 2**32 - 2  # of the seed's random streams, beside that of `data.feed`


def held_out_batches(config: ConfigDict, mesh: Mesh, count: int) -> Iterator[dict]:
    """Batches of at least `count` examples of `config.data.eval_split`, as a train step takes them, unflipped.

    The first `count` differ if the split has as many.
    """
    held_out, shards = config.copy_and_resolve_references(), sharding.batch_shards(mesh)
    held_out.data.update(train_split=config.data.eval_split, buckets=(), flip=False, num_workers=0)
    held_out.repa.target = "none"
    batch_size = shards * -(-min(count, config.eval.batch_size) // shards)
    with open_batches(held_out, mesh, batch_size=batch_size) as batches:
        yield from itertools.islice(batches, -(-count // batch_size))


class ValidationLoss:
    """The training loss of a model on `config.eval.loss_images` examples of `config.data.eval_split`.

    It is the loss of `config.diffusion` without what is added to it and without dropped conditions. Times are uniform
    over the range of training, whatever `config.diffusion.time` says, so that runs of different times can be compared.

    Raises UserError on construction if the split cannot be read.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.batches = list(held_out_batches(config, mesh, config.eval.loss_images))

        process, model = diffusion.build(config.diffusion), models.build(config.model)
        t0, t1 = process.prediction.time_range(sampling=False)

        def bucket_losses(params, batch: dict, number) -> jax.Array:
            stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), STREAM), number)

            def of(bucket):
                time_key, noise_key = jax.random.split(jax.random.fold_in(stream, bucket))
                x1 = batch["x1"]
                t = t0 + (t1 - t0) * (bucket + jax.random.uniform(time_key, x1.shape[:1])) / BUCKETS

                def predict(x_t, t):
                    return model.apply({"params": params}, x_t, t, batch["condition"]).prediction

                return jnp.mean(process.loss(predict, x1, jax.random.normal(noise_key, x1.shape), t))

            return jax.lax.map(of, jnp.arange(BUCKETS))

        self._measure = jax.jit(bucket_losses, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def run(self, params: Any) -> tuple[float, np.ndarray]:
        """The mean loss of these weights, and the loss by bucket of times, `[BUCKETS]`."""
        losses = [self._measure(params, batch, i) for i, batch in enumerate(self.batches)]
        by_bucket = np.mean(jax.device_get(losses), axis=0)
        return float(by_bucket.mean()), by_bucket
