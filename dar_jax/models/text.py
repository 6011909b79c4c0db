"""An encoder of captions that is trained along with its model: embedded words and a small transformer over them."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dar_jax.conditions import PADDING
from dar_jax.models.layers import Attention, Mlp, layer_norm, logical
from dar_jax.models.numerics import Arithmetic


class TextEncoder(nn.Module):
    """Maps words int32 `[B, L]`, numbered as by `conditions.Words`, to features `[B, L, size]`.

    Attributes:
      num_words: numbers there are, of padding and the empty caption too.
      size: of a word's features.
      depth: blocks of attention and MLP, pre-norm and residual. Padding is not read.
      num_heads: of attention.
      arithmetic: of the dense layers.
    """

    num_words: int
    size: int
    depth: int
    num_heads: int
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, words: Array) -> Array:
        axes, dtype = ("classes", "embed"), self.arithmetic.dtype
        table = self.param("words", logical(nn.initializers.normal(1.0), axes), (self.num_words, self.size))
        position = self.param("positions", logical(nn.initializers.normal(0.1), axes), (words.shape[1], self.size))
        x = (jnp.take(table, words, axis=0) + position).astype(dtype)
        for i in range(self.depth):
            attention = Attention(self.num_heads, self.arithmetic, name=f"attention_{i}")
            x = x + attention(layer_norm(x), words != PADDING)
            x = x + Mlp(4, self.arithmetic, name=f"mlp_{i}")(layer_norm(x))
        return x
