"""The forward pass opened up: what every sublayer reads, from which sources, with which weights.

The model runs as it is, but for its stack, which a plain one replaces: no custom backward pass, no kernels, every
softmax over depth written out. So derivatives with respect to any state are at hand, and the weights can be fixed.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.conditions import Condition
from dar_jax.models import SiT
from dar_jax.models.layers import Block, modulated_norm
from dar_jax.models.stack import ResidualStack, RoutedStack, constrain
from dar_jax.routing import Layout, inverse_rms


class Reads(NamedTuple):
    """What the A = 2 * depth + 1 readers of a stack see: sublayers 1..A-1 and then the head.

    Sources are at the position of the sublayer that made them, 0 for the embedded input; a chunk's summary is at the
    position of the chunk's last sublayer.

    Attributes:
      states: what each reads, h_1..h_A, `[A, B, T, D]`.
      outputs: v_0 and what each sublayer returns, v_0..v_(A-1), `[A, B, T, D]`.
      weights: of source i for reader l, `[A, A, B, T]` float32, zero where i is none of its sources; None: residual.
    """

    states: Array
    outputs: Array
    weights: Array | None


def forward(
    model: SiT, params: dict, x_t: Array, t: Array, condition: Condition, taps: Array | None = None
) -> tuple[Array, Reads]:
    """Returns the model's prediction `[B, H, W, C]` and the reads behind it.

    Args:
      model, params, x_t, t, condition: as the model takes them.
      taps: None, or zeros `[A, B, T, D]` added to what each reader reads, and to nothing else: the derivative of a
        loss with respect to them says how it hangs on each read.
    """
    with _opened(taps, None) as found:
        prediction = model.apply({"params": params}, x_t, t, condition).prediction
    return prediction, found[0]


@contextlib.contextmanager
def frozen_routing(weights: Array) -> Iterator[None]:
    """Within it, every routed model that is traced mixes its sources with these weights.

    weights: `[A, A, B or 1]`, by reader and position as in `Reads`; those of a reader sum to 1.
    """
    with _opened(None, jnp.asarray(weights)):
        yield


@contextlib.contextmanager
def _opened(taps: Array | None, weights: Array | None) -> Iterator[list[Reads]]:
    found = []

    def replace(call, args, kwargs, context):
        is_stack = context.method_name == "__call__" and isinstance(context.module, ResidualStack | RoutedStack)
        if not is_stack:
            return call(*args, **kwargs)
        stack, (v_0, condition, e_t, shift, scale) = context.module, args
        depth = stack.depth if isinstance(stack, ResidualStack) else stack.layout.depth
        zeros = jnp.zeros((2 * depth + 1, *v_0.shape), v_0.dtype) if taps is None else taps
        if isinstance(stack, ResidualStack):
            reads = _residual(stack, zeros, v_0, condition)
        else:
            reads = _routed(stack, zeros, weights, v_0, condition, e_t)
        found.append(reads)
        return modulated_norm(reads.states[-1] + zeros[-1], shift, scale)

    with nn.intercept_methods(replace):
        yield found


def _by_step(x: Array, num_steps: int) -> Array:
    """Leading axis of L sublayers -> two, steps and sublayers of a step."""
    return x.reshape(num_steps, -1, *x.shape[1:])


def _residual(stack: ResidualStack, taps: Array, v_0: Array, condition: Array) -> Reads:
    @partial(jax.checkpoint, prevent_cse=False)
    def step(h, inputs):
        params, taps = inputs
        block = Block(**stack.block, parent=None).bind({"params": params["block_0"]})
        states, outputs = [], []
        for (branch, shift, scale, gate), tap in zip(block.branches(condition), taps, strict=True):
            states.append(h)
            outputs.append(constrain(branch(modulated_norm(h + tap, shift, scale), gate)))
            h = constrain(h + outputs[-1])
        return h, (jnp.stack(states), jnp.stack(outputs))

    steps = stack.variables["params"]["steps"], _by_step(taps[:-1], stack.depth)
    h, (states, outputs) = jax.lax.scan(step, v_0, steps)
    return Reads(_join(states, h, last=True), _join(outputs, v_0, last=False), None)


def _routed(
    stack: RoutedStack, taps: Array, fixed: Array | None, v_0: Array, condition: Array, e_t: Array
) -> Reads:  # fmt: skip
    layout, params = stack.layout, stack.variables["params"]
    per_step, num_steps = layout.sublayers_per_step, layout.num_steps
    query = stack.query(stack.block["dtype"], parent=None)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(rows, inputs):
        index, params, taps, fixed = inputs
        count = layout.count(index)
        recent, states, weights = [], [], []
        for i in range(per_step // 2):
            block = Block(**stack.block, parent=None).bind({"params": params[f"block_{i}"]})
            for j, (branch, shift, scale, gate) in enumerate(block.branches(condition), start=2 * i):
                newest = recent[-1] if recent else rows[count - 1]
                u = query.apply({"params": params[f"query_{j}"]}, e_t, newest)
                h, alpha = _aggregate(layout, u, rows, count, recent, index, None if fixed is None else fixed[j])
                states.append(h)
                weights.append(alpha)
                recent.append(constrain(branch(modulated_norm(h + taps[j], shift, scale), gate)))
        rows = jax.lax.dynamic_update_slice_in_dim(rows, layout.rows(tuple(recent)), count, axis=0)
        return rows, (jnp.stack(states), jnp.stack(recent), jnp.stack(weights))

    rows = jnp.zeros((layout.num_rows, *v_0.shape), v_0.dtype).at[0].set(v_0)
    by_step = jax.tree.map(lambda x: _by_step(x[:-1], num_steps), (taps, fixed))
    rows, (states, outputs, weights) = jax.lax.scan(step, rows, (jnp.arange(num_steps), params["steps"], *by_step))

    recent = [] if layout.final == "summaries" else list(outputs[-1])
    if layout.final == "shared":
        final = jax.tree.map(lambda x: x[-1], params["steps"][f"query_{per_step - 1}"])
    else:
        final = params["final_query"]
    u = query.apply({"params": final}, e_t, recent[-1] if recent else rows[-1])
    fixed = None if fixed is None else fixed[-1]
    h, alpha = _aggregate(layout, u, rows, layout.num_final_rows, recent, num_steps - 1, fixed)
    return Reads(_join(states, h, last=True), _join(outputs, v_0, last=False), _join(weights, alpha, last=True))


def _aggregate(
    layout: Layout, u: Array, rows: Array, count: Array, recent: list[Array], index: Array, fixed: Array | None
) -> tuple[Array, Array]:
    """Softmax over the first `count` rows and the recent outputs of step `index` (paper Eq. 5).

    Returns the state `[B, T, D]` and the weights by position, `[A, B, T]`.
    """
    sources = jnp.stack([*rows, *recent])  # [K + R, B, T, D]
    place = jnp.arange(len(sources))
    is_source = ((place < count) | (place >= len(rows)))[:, None, None]
    row_stride = layout.sublayers_per_step // layout.rows_per_step
    first_recent = index * layout.sublayers_per_step + 1
    position = jnp.where(place < len(rows), place * row_stride, first_recent + place - len(rows))
    if fixed is None:
        scores = jnp.sum(u * sources, axis=-1) * inverse_rms(sources)
        alpha = jax.nn.softmax(jnp.where(is_source, scores, -jnp.inf), axis=0)
    else:
        alpha = jnp.broadcast_to(jnp.where(is_source, fixed[position][..., None], 0), sources.shape[:-1])
    h = constrain(jnp.sum(alpha[..., None] * sources, axis=0).astype(rows.dtype))
    return h, jnp.zeros((2 * layout.depth + 1, *alpha.shape[1:]), alpha.dtype).at[position].add(alpha)


def _join(steps: Array, other: Array, *, last: bool) -> Array:
    """Arrays by step and sublayer, and one more before or after them, as one stack over all."""
    flat = steps.reshape(-1, *steps.shape[2:])
    return jnp.concatenate([flat, other[None]] if last else [other[None], flat])
