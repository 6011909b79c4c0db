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
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), (size,))
        if self.kind == "dynamic":
            kernel_init = nn.with_logical_partitioning(zeros, ("embed", "query"))
            query = nn.Dense(size, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, name="project")(newest)
        else:
            query = self.param("weight", nn.with_logical_partitioning(zeros, ("norm",)), (size,))
            if self.kind == "static_t":
                query = query + time_embedding[:, None]
        return query.astype(jnp.promote_types(query.dtype, jnp.float32)) * (scale * size**-0.5)
