"""The residual stack, and the routed stack as the paper writes it: scans, plain autodiff, no kernels.

The plain routed stack has the parameters of the fused one (stack.py) and computes the same. It is the reference for
tests, what forward-mode derivatives run on, and what the diagnosis looks into. The gradient of a loss through it takes
memory that is quadratic in depth.

Both stacks show what their readers read, sublayer by sublayer and then the head, in linen's collection "intermediates":
"states" (what each reads), "outputs" (what each sublayer returns) and, if routed, "weights" of sources. A collection
"taps" is added to what each reader reads, and to nothing else.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.layers import constrain, logical, modulated_norm, ones, scan_steps
from dar_jax.routing import Layout, Query, inverse_rms


def show(module: nn.Module, reader: int, state: Array) -> Array:
    """Shows the state `[B, T, D]` of one reader within `module`, and returns it plus its tap, if there is one."""
    module.sow("intermediates", "states", state)
    taps = module.get_variable("taps", "added")
    return state if taps is None else state + taps[reader]


class ResidualStep(nn.Module):
    """One block of the ordinary residual stream, which keeps the streams after the blocks `hidden_at` beside it.

    The stream is also an output if `emits`.
    """

    block: Callable[..., nn.Module]
    hidden_at: tuple[int, ...]
    emits: bool = False

    @nn.compact
    def __call__(self, carry: tuple[Array, tuple[Array, ...]], index: Array, condition: Array) -> tuple:
        h, kept = run_block(self, self.block(name="block_0"), *carry, self.hidden_at, index, condition)
        return (h, kept), h if self.emits else None


def run_block(
    step: nn.Module,
    block: nn.Module,
    h: Array,
    kept: tuple[Array, ...],
    hidden_at: tuple[int, ...],
    index: Array,
    condition: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """The residual stream `[B, T, D]` after the block `index` (0-based), and what is kept of streams (`ResidualStep`).

    What readers read is shown within the module `step`.
    """
    for j, (branch, shift, scale, gate) in enumerate(block.branches(condition)):
        output = branch(modulated_norm(show(step, j, h), shift, scale), gate)
        step.sow("intermediates", "outputs", output)
        h = constrain(h + output)
    return h, tuple(jnp.where(index == k - 1, h, old) for k, old in zip(hidden_at, kept, strict=True))


def rematerialised(step: type[nn.Module], remat: str) -> type[nn.Module]:
    """`step` as `config.model.remat` says: its inputs alone are kept for the backward pass if that is "block"."""
    return nn.remat(step, prevent_cse=False) if remat == "block" else step


class ResidualStack(nn.Module):
    """`depth` blocks on a residual stream: `[B, T, D]` and condition `[B, D]` -> what the head reads, `[B, T, D]`.

    Also returns the stream after each block of `hidden_at`, `[B, T, D]`.
    """

    block: Callable[..., nn.Module]
    depth: int
    remat: str

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        del e_t
        steps = scan_steps(rematerialised(ResidualStep, self.remat), self.depth, (0, nn.broadcast))(
            self.block, hidden_at, name="steps"
        )
        start = v_0, tuple(jnp.zeros_like(v_0) for _ in hidden_at)
        (h, kept), _ = steps(start, jnp.arange(self.depth), condition)
        self.sow("intermediates", "outputs", v_0)
        return modulated_norm(show(self, 0, h), shift, scale), kept


class PlainRoutedStep(nn.Module):
    """P sublayers, each fed by its own aggregator over the history and the recent outputs of this step.

    It also returns what they read, P times `[B, T, D]`, as an output if `emits`.
    """

    block: Callable[..., nn.Module]
    layout: Layout
    query: type[Query]
    emits: bool
    removed: Array | None

    @nn.compact
    def __call__(self, carry, index: Array, fixed: Array | None, condition: Array, e_t: Array):
        rows, layout, recent, states = carry[0], self.layout, (), []
        count = layout.count(index)
        for i in range(layout.sublayers_per_step // 2):
            block = self.block(name=f"block_{i}")
            for j, (branch, shift, scale, gate) in enumerate(block.branches(condition), start=2 * i):
                newest = recent[-1] if recent else rows[count - 1]
                u = self.query(name=f"query_{j}")(e_t, newest)
                given = None if fixed is None else fixed[j]
                own = make_gate(self, layout, f"gate_{j}")
                h, weights = aggregate(layout, u, rows, count, recent, index, given, self.removed, own)
                states.append(h)
                recent += (constrain(branch(modulated_norm(show(self, j, h), shift, scale), gate)),)
                self.sow("intermediates", "outputs", recent[-1])
                self.sow("intermediates", "weights", weights)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, layout.rows(recent), count, axis=0)
        return (rows, recent), states if self.emits else None


class PlainRoutedStack(nn.Module):
    """`layout.depth` blocks routed by DAR and the final aggregator: `[B, T, D]` -> what the head reads, `[B, T, D]`.

    Also returns what the block after each block of `hidden_at` reads, `[B, T, D]`.

    frozen_weights: None, or `[A, A, B or 1]`: the weights of sources for each of the A = 2 * depth + 1 readers, both
      by position (`aggregate`), which stand in place of the softmax. Those of a reader sum to 1.
    removed: None, or bool `[A]`: the sources by position that no reader sees, unless it sees nothing else.
    """

    block: Callable[..., nn.Module]
    layout: Layout
    query: type[Query]
    frozen_weights: Array | None
    removed: Array | None = None

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        layout, steps = self.layout, plain_steps(self, emits=bool(hidden_at), removed=self.removed)
        e_t = self.query.given(self, e_t)
        start, indices, _ = first_inputs(layout, v_0)
        fixed, last_fixed = None, None
        if self.frozen_weights is not None:
            weights = jnp.asarray(self.frozen_weights)
            by_step = layout.num_steps, layout.sublayers_per_step, *weights.shape[1:]
            fixed, last_fixed = weights[:-1].reshape(by_step), weights[-1]
        (rows, recent), states = steps(start, indices, fixed, condition, e_t)

        recent = recent if layout.final_set.sees_outputs else ()
        u = final_query(self, steps)(e_t, recent[-1] if recent else rows[-1])
        filled, index = layout.num_final_rows, layout.num_steps - 1
        gate = make_gate(self, layout, "final_gate")
        h, weights = aggregate(layout, u, rows, filled, recent, index, last_fixed, self.removed, gate)
        self.sow("intermediates", "outputs", v_0)
        self.sow("intermediates", "weights", weights)
        x = modulated_norm(show(self, 0, h), shift, scale)
        places = [divmod(2 * k, layout.sublayers_per_step) for k in hidden_at]
        return x, tuple(states[position][step] for step, position in places)


def plain_steps(stack: nn.Module, *, emits: bool = False, removed: Array | None = None) -> nn.Module:
    """The scanned steps of a plain or fused stack, which hold its parameters."""
    step = nn.remat(PlainRoutedStep, prevent_cse=False)
    steps = scan_steps(step, stack.layout.num_steps, (0, 0, nn.broadcast, nn.broadcast))
    return steps(stack.block, stack.layout, stack.query, emits, removed, name="steps")


def first_inputs(layout: Layout, v_0: Array) -> tuple:
    """What `plain_steps` takes besides condition and e(t): the first carry, the numbers of the steps, no weights."""
    rows = jnp.zeros((layout.num_rows, *v_0.shape), v_0.dtype).at[0].set(v_0)
    return (rows, layout.sublayers_per_step * (jnp.zeros_like(v_0),)), jnp.arange(layout.num_steps), None


def make_gate(module: nn.Module, layout: Layout, name: str) -> Array | None:
    """The gate of an additive reader, a scalar that is one in a fresh model; None: the reader is not additive.

    Fresh queries are zero, so routing makes the mean of the sources. That only lengthens the stream, which LayerNorm
    undoes. With a gate of zero nothing would ever move: it has no gradient as long as the query is zero, and the query
    has none as long as the gate is.
    """
    return module.param(name, logical(ones, ()), ()) if layout.is_additive else None


def final_query(stack: nn.Module, steps: nn.Module) -> Callable[[Array, Array], Array]:
    """The query of the head's aggregator: one of its own, or that of the last sublayer of the scanned `steps`."""
    if stack.layout.final_set.has_query:
        return stack.query(name="final_query")
    return sublayer_query(stack, steps, 2 * stack.layout.depth - 1)


def sublayer_query(stack: nn.Module, steps: nn.Module, sublayer: int) -> Callable[[Array, Array], Array]:
    """The query of a sublayer's aggregator (0-based)."""
    step, position = divmod(sublayer, stack.layout.sublayers_per_step)
    params = nn.meta.unbox(steps.variables["params"].get(f"query_{position}", {}))
    params = jax.tree.map(lambda p: p[step], params)
    return stack.query(parent=None).bind({"params": params})


def sublayer_gate(layout: Layout, steps: nn.Module, sublayer: int) -> Array | None:
    """The gate of a sublayer's reader (0-based); None: it is not additive."""
    step, position = divmod(sublayer, layout.sublayers_per_step)
    gates = nn.meta.unbox(steps.variables["params"].get(f"gate_{position}"))
    return None if gates is None else gates[step]


def aggregate(
    layout: Layout,
    u: Array,
    rows: Array,
    count: Array,
    recent: tuple[Array, ...],
    index: Array,
    fixed: Array | None,
    removed: Array | None = None,
    gate: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax over the first `count` rows of the history and the recent outputs of step `index` (paper Eq. 5).

    The position of a source is the number of the sublayer that made it, 0 for v_0; a summary is at the position of its
    chunk's last sublayer. `fixed`, `[A, B or 1]` by position, stands in place of the softmax. `removed` is that of
    `PlainRoutedStack`. With a `gate` the state is the sum of the sources plus gate times what the weights make of them.

    Returns the state `[B, T, D]` and the weights by position, `[A, B, T]`, zero where there is no source.
    """
    sources = jnp.stack([*rows, *recent])  # [K + R, B, T, D]
    place = jnp.arange(len(sources))
    is_source = (place < count) | (place >= len(rows))
    row_stride = layout.sublayers_per_step // layout.rows_per_step
    first_recent = index * layout.sublayers_per_step + 1
    position = jnp.where(place < len(rows), place * row_stride, first_recent + place - len(rows))
    if removed is not None:
        left = is_source & ~removed[position]
        is_source = jnp.where(jnp.any(left), left, is_source)
    if fixed is None:
        alpha = source_weights(u, sources, is_source)
    else:
        fixed = jnp.where(is_source[:, None, None], fixed[position][..., None], 0)
        alpha = jnp.broadcast_to(fixed, sources.shape[:-1])
    read = alpha if gate is None else is_source[:, None, None] + gate * alpha
    return weighted(sources, read), jnp.zeros((2 * layout.depth + 1, *alpha.shape[1:]), alpha.dtype).at[position].add(
        alpha
    )


def source_weights(u: Array, sources: Array, is_source: Array) -> Array:
    """Softmax over those of the sources `[K, B, T, D]` where `is_source` `[K]` is true (paper Eq. 5): `[K, B, T]`."""
    scores = jnp.sum(u * sources, axis=-1) * inverse_rms(sources)
    return jax.nn.softmax(jnp.where(is_source[:, None, None], scores, -jnp.inf), axis=0)


def weighted(sources: Array, weights: Array) -> Array:
    """The state `[B, T, D]` of sources `[K, B, T, D]` and their weights `[K, B, T]`, in the type of the sources."""
    return constrain(jnp.sum(weights[..., None] * sources, axis=0).astype(sources.dtype))
