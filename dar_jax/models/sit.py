"""SiT, the diffusion transformer, with a residual or a routed stack."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dar_jax.conditions import Condition
from dar_jax.models import layers, numerics
from dar_jax.models.plain_stack import PlainRoutedStack, ResidualStack
from dar_jax.models.rivals import Rival
from dar_jax.models.stack import RoutedStack
from dar_jax.routing import Layout, Query


class Output(NamedTuple):
    """What a model returns.

    Attributes:
      prediction: of the velocity, or of what else the model is trained to predict, float32 `[B, H, W, C]`.
      hidden: the states that were asked for, each `[B, T, D]` in the type of the activations.
    """

    prediction: Array
    hidden: tuple[Array, ...] = ()


class SiT(nn.Module):
    """Maps x_t `[B, H, W, C]`, t `[B]` in [0, 1] and {"label": int32 `[B]`} to an `Output`.

    Labels are 0 to num_classes; the last is the null label (dar_jax/conditions.py). The fields are those of
    `config.model` (dar_jax/config.py), with the routing as `layout`, `query` and `implementation`. Without a layout the
    stack is that of `rival`, or residual.

    Each k of `hidden_at`, of 1 to depth - 1, asks for the state that enters block k + 1, before its norm: the residual
    stream after block k, or what the first aggregator of block k + 1 hands on.

    A `plain` model computes the same from the same parameters. It has derivatives of all modes and orders and shows its
    states (plain_stack.py), but trains more slowly and in more memory. `frozen_weights` and `removed` are of
    `PlainRoutedStack`. `query_t` `[B]` are other times for the queries of a routed stack alone.
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
    dtype: jnp.dtype
    remat: str
    layout: Layout | None
    query: type[Query]
    implementation: str
    rival: Rival | None = None
    plain: bool = False
    frozen_weights: Array | None = None  # of a plain routed stack
    removed: Array | None = None  # likewise

    @nn.compact
    def __call__(
        self,
        x_t: Array,
        t: Array,
        condition: Condition,
        *,
        hidden_at: tuple[int, ...] = (),
        query_t: Array | None = None,
    ) -> Output:
        if not all(0 < k < self.depth for k in hidden_at):
            raise ValueError(f"hidden_at = {hidden_at} must be in 1 to {self.depth - 1}, the depth less one.")
        size, dtype = self.hidden_size, self.dtype
        arithmetic = numerics.Arithmetic.of(dtype, plain=self.plain)
        starts_at_zero = self.layout is not None and self.query.adds_time
        embed = layers.TimestepEmbedder(size, starts_at_zero, arithmetic, name="timestep")
        e_t = embed(t)
        e_t_of_queries = e_t if query_t is None else embed(query_t)
        label = layers.LabelEmbedder(self.num_classes, size, dtype, name="label")(condition["label"])
        modulation = e_t + label  # [B, D], of which every adaLN makes its shifts, scales and gates

        tokens = layers.patchify(x_t.astype(dtype), self.patch_size)
        tokens = layers.Dense((size,), ("patch", "embed"), arithmetic, name="patch")(tokens)
        grid = self.input_size // self.patch_size
        v_0 = layers.constrain(tokens + layers.position_table(grid, size).astype(dtype))  # [B, T, D]

        block = partial(layers.Block, size, self.num_heads, self.mlp_ratio, arithmetic)
        if self.rival is not None:
            stack = self.rival.stack(block, self.depth, self.remat, name="stack")
        elif self.layout is None:
            stack = ResidualStack(block, self.depth, self.remat, name="stack")
        elif self.plain:
            fixed = self.frozen_weights, self.removed
            stack = PlainRoutedStack(block, self.layout, self.query, *fixed, name="stack")
        else:
            stack = RoutedStack(block, self.layout, self.query, self.implementation, self.remat, name="stack")
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        head = layers.Head(size, self.patch_size**2 * out_channels, arithmetic, name="head")
        x, hidden = stack(v_0, modulation, e_t_of_queries, *head.modulation(modulation), hidden_at)
        prediction = layers.unpatchify(head(x), self.patch_size, grid)[..., : self.channels]
        return Output(prediction.astype(jnp.promote_types(dtype, jnp.float32)), hidden)
