"""The query of an aggregator (paper Eq. 6) with the scale of its RMSNorm folded in."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Query(nn.Module):
    """Parameters of one aggregator: the query and the RMSNorm scale `g`.

    q . RMSNorm(v) / sqrt(D) = (q * g / sqrt(D)) . v / rms(v), so the key norm costs one scalar per token, stored
    with the source. Queries start at zero: routing starts uniform.

    Attributes:
      kind: "static" (q = w), "static_t" (q = w + e(t)) or "dynamic" (q = W v_newest).
      dtype: of the dynamic projection's matmul.
    """

    kind: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, time_embedding: Array, newest: Array) -> Array:
        """Returns q * g / sqrt(D) in float32: `[D]` static, `[B, 1, D]` static_t, `[B, T, D]` dynamic.

        Args:
          time_embedding: e(t), the model's own timestep embedding, `[B, D]`.
          newest: the newest source of the aggregator's set, `[B, T, D]`; only the dynamic query reads it.
        """
        size = newest.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), (size,)) * size**-0.5
        if self.kind == "dynamic":
            kernel = self.param("kernel", nn.with_logical_partitioning(zeros, ("embed", "query")), (size, size))
            # The scale goes into the matrix, which is smaller than what it makes of all tokens.
            query = newest.astype(self.dtype) @ (kernel * scale).astype(self.dtype)
            return query.astype(jnp.promote_types(self.dtype, jnp.float32))
        query = self.param("weight", nn.with_logical_partitioning(zeros, ("norm",)), (size,))
        return (query + time_embedding[:, None] if self.kind == "static_t" else query) * scale
