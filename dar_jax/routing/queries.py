"""The queries of aggregators (paper Eq. 6), each with the scale of its RMSNorm folded in."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

zeros, ones = nn.initializers.zeros, nn.initializers.ones


class Query(nn.Module):
    """Parameters of one aggregator: those of the query q, and the scale g of the RMSNorm of its keys.

    q . RMSNorm(v) / sqrt(D) = (q * g / sqrt(D)) . v / rms(v), so the key norm costs one scalar per token, stored
    with the source. In a fresh model q is zero, so that routing starts uniform.

    A query is a subclass, which is called with e(t), the model's own timestep embedding `[B, D]`, and the newest source
    of the aggregator's set, `[B, T, D]`. It returns q * g / sqrt(D) in float32, `[B, 1, D]` if all tokens of a sample
    share it, otherwise `[B, T, D]`. An entry of `QUERIES` gives it a name in configs.

    Attributes:
      reads_newest: whether q depends on the newest source. Queries that do not are known when a step starts.
      adds_time: whether q contains e(t). The embedder of a fresh model then starts at e(t) = 0, and a warm-started
        aggregator starts at g = 0.
    """

    reads_newest = False
    adds_time = False

    @classmethod
    def given(cls, stack: nn.Module, time_embedding: Array) -> Array:
        """What the aggregators of a stack get in place of e(t): e(t), unless they share more than that."""
        return time_embedding

    @staticmethod
    def multiply_adds(size: int) -> int:
        """Multiply-adds per token that make q from its arguments, with D = `size`."""
        return 0

    def scale(self, size: int) -> Array:
        """g / sqrt(D), `[D]`."""
        return self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), (size,)) * size**-0.5

    def weight(self, size: int) -> Array:
        """A learned vector w, `[D]`."""
        return self.param("weight", nn.with_logical_partitioning(zeros, ("norm",)), (size,))


class Static(Query):
    """q = w."""

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        samples, size = time_embedding.shape
        return jnp.broadcast_to(self.weight(size) * self.scale(size), (samples, 1, size))


class Shared(Query):
    """q = w, with the same w and g in all aggregators of a stack, which has them (SANA-Video 2.0, arXiv 2607.21553)."""

    @classmethod
    def given(cls, stack: nn.Module, time_embedding: Array) -> Array:
        query = Static(parent=stack, name="shared_query")(time_embedding, time_embedding[:, None])
        return query[:, 0]

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        return time_embedding[:, None]


class StaticT(Query):
    """q = w + e(t)."""

    adds_time = True

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        size = time_embedding.shape[-1]
        return (self.weight(size) + time_embedding[:, None]) * self.scale(size)


class GatedT(Query):
    """q = w + g_t e(t), with a gate g_t for each feature that is zero in a fresh model.

    So the embedder of times need not start at zero, as it does for `StaticT`, where it silences adaLN at first.
    """

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        size = time_embedding.shape[-1]
        gate = self.param("gate", nn.with_logical_partitioning(zeros, ("norm",)), (size,))
        return (self.weight(size) + gate * time_embedding[:, None]) * self.scale(size)


class Dynamic(Query):
    """q = W v, where v is the newest source."""

    reads_newest = True

    @staticmethod
    def multiply_adds(size: int) -> int:
        return size**2

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        size = newest.shape[-1]
        kernel = self.param("kernel", nn.with_logical_partitioning(zeros, ("embed", "query")), (size, size))
        # The scale goes into the matrix, which is smaller than what it makes of all tokens.
        query = newest @ (kernel * self.scale(size)).astype(newest.dtype)
        return query.astype(jnp.promote_types(newest.dtype, jnp.float32))


class Uniform(Static):
    """q = 0, whatever its parameters: the mean of the sources, which is what remains if nothing is learned."""

    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        return jnp.zeros_like(super().__call__(time_embedding, newest))


QUERIES = {
    "uniform": Uniform,
    "shared": Shared,
    "static": Static,
    "static_t": StaticT,
    "gated_t": GatedT,
    "dynamic": Dynamic,
}
