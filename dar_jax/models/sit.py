"""SiT, the diffusion transformer, with a residual or a routed stack."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models import layers
from dar_jax.models.stack import ResidualStack, RoutedStack, constrain
from dar_jax.routing import Layout


class SiT(nn.Module):
    """Maps x_t `[B, H, W, C]`, t `[B]` in [0, 1] and labels y `[B]` to the prediction `[B, H, W, C]` in float32.

    With `train=True` and `label_dropout` > 0 labels are replaced by the null label `num_classes` at random, which
    needs the rng `label_dropout`. The fields are those of `config.model` (dar_jax/config.py).
    """

    input_size: int
    channels: int
    num_classes: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    learn_sigma: bool
    label_dropout: float
    dtype: jnp.dtype
    remat: str
    layout: Layout | None  # None: residual
    query: str
    implementation: str

    @nn.compact
    def __call__(self, x: Array, t: Array, y: Array, train: bool = False) -> Array:
        if train and self.label_dropout:
            drop = jax.random.bernoulli(self.make_rng("label_dropout"), self.label_dropout, y.shape)
            y = jnp.where(drop, self.num_classes, y)
        size, dtype = self.hidden_size, self.dtype
        static_t = self.layout is not None and self.query == "static_t"
        e_t = layers.TimestepEmbedder(size, static_t, dtype, name="timestep")(t)
        condition = e_t + layers.LabelEmbedder(self.num_classes, size, dtype, name="label")(y)

        tokens = layers.patchify(x.astype(dtype), self.patch_size)
        tokens = layers.Dense((size,), ("patch", "embed"), dtype, name="patch")(tokens)
        grid = self.input_size // self.patch_size
        v_0 = constrain(tokens + layers.position_table(grid, size).astype(dtype))  # [B, T, D]

        block = {"hidden_size": size, "num_heads": self.num_heads, "mlp_ratio": self.mlp_ratio, "dtype": dtype}
        if self.layout is None:
            stack = ResidualStack(block, self.depth, self.remat, name="stack")
        else:
            stack = RoutedStack(block, self.layout, self.query, self.implementation, self.remat, name="stack")
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        head = layers.Head(size, self.patch_size**2 * out_channels, dtype, name="head")
        out = head(stack(v_0, condition, e_t, *head.modulation(condition)))
        return layers.unpatchify(out, self.patch_size, grid)[..., : self.channels].astype(jnp.float32)
