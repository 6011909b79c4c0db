"""What a routed model loses without one of its parts: the time in its queries, or a source.

A weight says how much of a source is read, and a loss what it is worth: sources with small weights may matter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax.diagnosis import pairs
from dar_jax.diagnosis.probes import make_velocity_loss
from dar_jax.logs import say
from dar_jax.models import SiT


def ablate(
    config: ConfigDict, model: SiT, mesh: Mesh, params: dict, chosen: pairs.Pairs, is_source: np.ndarray
) -> dict:
    """Losses of a routed model with parts of it removed, on the same pairs as its own loss.

    Args:
      params: of the routed `model`.
      chosen: pairs of images and noises.
      is_source: which source each reader has, `[A, A]` by reader and source.

    Returns:
      {"loss_shuffled_t": [times], where the queries see the time of another pair, drawn from those of `chosen`;
      "sources": positions of the N sources that anybody has; "loss_without": [times, N], where no reader sees the
      source}. A reader with no other source keeps it.
    """
    velocity_loss, everywhere = make_velocity_loss(config), NamedSharding(mesh, PartitionSpec())

    def total_loss(params, batch, t, query_t, removed):
        ablated = model.clone(plain=True, removed=removed)

        def predict(x_t, t):
            return ablated.apply({"params": params}, x_t, t, batch["condition"], query_t=query_t).prediction

        return (velocity_loss(predict, batch, t) * batch["weight"]).sum()

    total_loss = jax.jit(total_loss, out_shardings=everywhere)
    count, sources = len(is_source), np.flatnonzero(is_source.any(axis=0))
    say(f"ablations: the time of the queries, and {len(sources)} sources one by one")
    shuffled, without = np.zeros(len(chosen.times)), np.zeros((len(chosen.times), len(sources)))
    rng = np.random.default_rng(config.seed)
    for batch in pairs.batches(config, chosen, mesh):
        for i, t in enumerate(chosen.times):
            at = np.full(chosen.batch_size, t, np.float32)
            others = rng.choice(chosen.times, chosen.batch_size).astype(np.float32)
            shuffled[i] += total_loss(params, batch, at, others, jnp.zeros(count, bool))
            for j, source in enumerate(sources):
                without[i, j] += total_loss(params, batch, at, at, jnp.arange(count) == source)
    losses = {"loss_shuffled_t": shuffled / chosen.num_images, "loss_without": without / chosen.num_images}
    return {"sources": sources, **losses}
