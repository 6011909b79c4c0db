"""The stack of blocks under `nn.scan`: the residual stream, or routing over a history buffer.

The routed scan carries the history as one buffer `[K, B, T, D]`. Plain autodiff would save the whole buffer in every
iteration, which is quadratic in depth. The buffer is append-only, so its final value holds every prefix: the forward
pass keeps only that, and the backward pass runs the steps in reverse and accumulates the cotangent of the buffer. It
recomputes each step from the prefix it saw (remat = "block"), or takes what the forward pass saved ("dense").
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.layers import Block, modulated_norm
from dar_jax.routing import Execution, Layout, Query, add_cotangent, inverse_rms, read, statistics_dtype, sublayer_input


def constrain(x: Array) -> Array:
    """Shards tokens `[B, T, D]` (or a stack of them) over the mesh by the logical rules."""
    return nn.with_logical_constraint(x, (None,) * (x.ndim - 3) + ("batch", "tokens", "hidden"))


def execution(implementation: str, mean_count: float) -> Execution:
    """How aggregations run on the current mesh: split as the logical rules split "batch" and "tokens"."""
    if jax.sharding.get_abstract_mesh().empty:
        return Execution(implementation, mean_count=mean_count)
    names = nn.logical_to_mesh_axes(("batch", "tokens"))
    batch_axes, token_axes = ((axes,) if isinstance(axes, str) else axes or () for axes in names)
    return Execution(implementation, batch_axes, token_axes, mean_count)


class History(NamedTuple):
    """What the routed scan carries.

    Attributes:
      sources: the buffer, `[K, B, T, D]`; rows not yet appended mean nothing.
      inv_rms: 1 / rms of every row, `[K, B, T]` float32.
      recent: all outputs of the latest step, P times `[B, T, D]`: the final aggregator reads them in full.
    """

    sources: Array
    inv_rms: Array
    recent: tuple[Array, ...]

    @classmethod
    def start(cls, layout: Layout, v_0: Array, implementation: str) -> "History":
        # Kernels do not read rows that are not filled. XLA multiplies them by zero, so they must be finite.
        new = jnp.zeros if implementation == "xla" else jax.lax.empty
        sources = constrain(new((layout.num_rows, *v_0.shape), v_0.dtype))
        inv_rms = jnp.zeros(sources.shape[:-1], statistics_dtype(v_0))
        return cls(sources, inv_rms, layout.sublayers_per_step * (jnp.zeros_like(v_0),)).append(0, v_0[None], None)

    def append(self, count: Array, rows: Array, recent: tuple[Array, ...] | None) -> "History":
        """The history with `rows` from row `count` on, and the outputs of the latest step (None: as they are)."""
        sources = jax.lax.dynamic_update_slice_in_dim(self.sources, rows, count, axis=0)
        inv_rms = jax.lax.dynamic_update_slice_in_dim(self.inv_rms, inverse_rms(rows), count, axis=0)
        return History(sources, inv_rms, recent or self.recent)


class ResidualStep(nn.Module):
    """One block of the ordinary residual stream."""

    block: dict

    @nn.compact
    def __call__(self, h: Array, condition: Array) -> tuple[Array, None]:
        block = Block(**self.block, name="block_0")
        for branch, shift, scale, gate in block.branches(condition):
            h = constrain(h + branch(modulated_norm(h, shift, scale), gate))
        return h, None


class Reads(NamedTuple):
    """What the cotangent of the sources takes from all reads of a step, of Q queries together."""

    u: tuple[Array, ...]  # Q times [B, 1 or T, D]
    log_sum: Array  # [Q, B, T]


class RoutedStep(nn.Module):
    """P sublayers, each fed by its own aggregator over the history and the recent outputs of this step."""

    block: dict
    layout: Layout
    query: type[Query]
    implementation: str

    def setup(self):
        self.blocks = [Block(**self.block, name=f"block_{i}") for i in range(self.layout.sublayers_per_step // 2)]
        self.queries = [
            self.query(self.block["dtype"], name=f"query_{j}") for j in range(self.layout.sublayers_per_step)
        ]

    def outputs(
        self, sources: Array, inv_rms: Array, count: Array, newest: Array, condition: Array, e_t: Array, taps=None
    ) -> tuple[tuple[Array, ...], list[Reads]]:
        """The sublayer outputs of this step, P times `[B, T, D]`, and its reads.

        The first `count` rows of the history are filled; `newest` is the last of them, for queries that read it.
        With `taps`, one per read, the history gets no cotangent (see `routing.read`).
        """
        how = execution(self.implementation, self.layout.mean_count)
        reads = []

        def read_history(*u):
            tap = taps[len(reads)] if taps else None
            aggregates, log_sums = read(how, u, sources, inv_rms, count, tap)
            reads.append(Reads(u, log_sums))
            return list(zip(u, aggregates, log_sums, strict=True))

        early = not self.query.reads_newest
        if early:  # every query of the step is known: one pass over the history serves them all
            aggregated = read_history(*(query(e_t, newest) for query in self.queries))
        recent, norms = (), ()
        for i, block in enumerate(self.blocks):
            for j, (branch, shift, scale, gate) in enumerate(block.branches(condition), start=2 * i):
                if early:
                    u, aggregate, log_sum = aggregated[j]
                else:
                    newest = recent[-1] if recent else newest
                    ((u, aggregate, log_sum),) = read_history(self.queries[j](e_t, newest))
                x, recent = sublayer_input(how, u, aggregate, log_sum, recent, norms, shift, scale)
                recent += (constrain(branch(constrain(x), gate)),)
                norms += (inverse_rms(recent[-1]),)
        return recent, reads

    def taps(self, v_0: Array) -> list[tuple[tuple[Array, ...], Array]]:
        """Zeros in the shape of what every read of a step returns."""
        num_reads = self.layout.sublayers_per_step if self.query.reads_newest else 1
        q = self.layout.sublayers_per_step // num_reads
        tap = q * (jnp.zeros_like(v_0),), jnp.zeros((q, *v_0.shape[:-1]), statistics_dtype(v_0))
        return num_reads * [tap]

    def __call__(self, history: History, step: Array, condition: Array, e_t: Array) -> tuple[History, None]:
        count = self.layout.count(step)
        newest = history.sources[count - 1]
        recent, _ = self.outputs(history.sources, history.inv_rms, count, newest, condition, e_t)
        return history.append(count, self.layout.rows(recent), recent), None


class ResidualStack(nn.Module):
    """`depth` blocks on a residual stream: `[B, T, D]` and condition `[B, D]` -> what the head reads, `[B, T, D]`."""

    block: dict
    depth: int
    remat: str

    @nn.compact
    def __call__(self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array) -> Array:
        del e_t
        step = nn.remat(ResidualStep, prevent_cse=False) if self.remat == "block" else ResidualStep
        h, _ = _scan(step, self.depth, in_axes=nn.broadcast)(self.block, name="steps")(v_0, condition)
        return modulated_norm(h, shift, scale)


class RoutedStack(nn.Module):
    """`layout.depth` blocks routed by DAR and the final aggregator: `[B, T, D]` -> what the head reads, `[B, T, D]`."""

    block: dict
    layout: Layout
    query: type[Query]
    implementation: str
    remat: str

    @nn.compact
    def __call__(self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array) -> Array:
        layout, last = self.layout, f"query_{self.layout.sublayers_per_step - 1}"
        in_axes = (0, nn.broadcast, nn.broadcast)
        steps = _scan(RoutedStep, layout.num_steps, in_axes)(
            self.block, layout, self.query, self.implementation, name="steps"
        )  # fmt: skip
        run = nn.custom_vjp(self._forward, self._forward_and_residuals, self._backward)
        history = run(steps, v_0, condition, e_t)

        recent = () if layout.final == "summaries" else history.recent
        newest = recent[-1] if recent else history.sources[-1]
        if layout.final == "shared":
            params = jax.tree.map(lambda p: p[-1], nn.meta.unbox(steps.variables["params"][last]))
            u = self.query(self.block["dtype"], parent=None).apply({"params": params}, e_t, newest)
        else:
            u = self.query(self.block["dtype"], name="final_query")(e_t, newest)
        how = execution(self.implementation, layout.num_final_rows)
        count = jnp.int32(layout.num_final_rows)
        (aggregate,), (log_sum,) = read(how, (u,), history.sources, history.inv_rms, count)
        norms = tuple(inverse_rms(v) for v in recent)
        return constrain(sublayer_input(how, u, aggregate, log_sum, recent, norms, shift, scale)[0])

    def _forward(self, steps: nn.Module, v_0: Array, condition: Array, e_t: Array) -> History:
        history = History.start(self.layout, v_0, self.implementation)
        return steps(history, jnp.arange(self.layout.num_steps), condition, e_t)[0]

    def _forward_and_residuals(self, steps: nn.Module, v_0: Array, condition: Array, e_t: Array):
        params = steps.variables["params"]
        if self.remat == "block":
            history = self._forward(steps, v_0, condition, e_t)
            return history, (params, history, condition, e_t, None)

        def advance(history, index_and_params):
            index, step_params = index_and_params
            inputs = history, step_params, condition, e_t
            values, linear = self._linearize(index, *inputs)
            history = history.append(self.layout.count(index), self.layout.rows(values), values)
            return history, _save(linear, known=inputs)

        scanned = jnp.arange(self.layout.num_steps), params
        history, saved = jax.lax.scan(advance, History.start(self.layout, v_0, self.implementation), scanned)
        return history, (params, history, condition, e_t, saved)

    def _linearize(self, index: Array, history: History, params: dict, condition: Array, e_t: Array):
        """The outputs of step `index`, and its linear part: the vjp and the reads."""
        step = RoutedStep(self.block, self.layout, self.query, self.implementation, parent=None)  # a pure function
        count = self.layout.count(index)

        def outputs(params, *inputs):
            inputs = history.sources, history.inv_rms, count, *inputs
            return step.apply({"params": params}, *inputs, method="outputs")

        newest, taps = history.sources[count - 1], step.taps(history.sources[0])
        values, vjp, reads = jax.vjp(outputs, params, newest, condition, e_t, taps, has_aux=True)
        return values, (vjp, reads)

    def _backward(self, residuals, d_final: History):
        layout = self.layout
        params, history, condition, e_t, saved = residuals
        how = execution(self.implementation, layout.mean_count)
        d_rows_to_d_values = jax.linear_transpose(layout.rows, history.recent)

        def reverse(carry, scanned):
            d_sources, d_condition, d_e_t = carry
            index, step_params, saved = scanned
            # The final buffer stands for the one this step saw: a step reads only rows that were filled before it.
            inputs = history, step_params, condition, e_t
            vjp, reads = self._linearize(index, *inputs)[1] if saved is None else saved(inputs)

            count = layout.count(index)
            (d_values,) = d_rows_to_d_values(jax.lax.dynamic_slice_in_dim(d_sources, count, layout.rows_per_step))
            # Outside the scan the final aggregator reads the outputs of the last step, and no others.
            is_last = index == layout.num_steps - 1
            d_values = tuple(d + jnp.where(is_last, r, 0) for d, r in zip(d_values, d_final.recent, strict=True))
            d_params, d_newest, d_c, d_e, d_taps = vjp(d_values)

            u, log_sum = _join(reads)
            g, l = _join(d_taps)
            d_sources = add_cotangent(how, d_sources, u, history.sources, history.inv_rms, count, log_sum, g, l)
            if self.query.reads_newest:
                d_sources = d_sources.at[count - 1].add(d_newest)
            return (d_sources, d_condition + d_c, d_e_t + d_e), d_params

        carry = d_final.sources, jnp.zeros_like(condition), jnp.zeros_like(e_t)
        scanned = jnp.arange(layout.num_steps), params, saved
        (d_sources, d_condition, d_e_t), d_params = jax.lax.scan(reverse, carry, scanned, reverse=True)
        return {"params": d_params}, d_sources[0], d_condition, d_e_t


def _save(tree, known) -> jax.tree_util.Partial:
    """A function of `known` that returns `tree`. It holds the arrays of `tree` once, and none of those of `known`.

    Without this a scan that saves the residuals of its steps would save the whole history in each.
    """
    arrays = jax.tree.leaves(known)
    num_known = len(arrays)
    leaves, treedef = jax.tree.flatten(tree)
    positions = []
    for leaf in leaves:
        position = next((i for i, x in enumerate(arrays) if x is leaf), len(arrays))
        arrays += [leaf] if position == len(arrays) else []
        positions.append(position)

    def restore(saved, known):
        arrays = [*jax.tree.leaves(known), *saved]
        return treedef.unflatten([arrays[i] for i in positions])

    return jax.tree_util.Partial(restore, arrays[num_known:])


def _join(pairs: list) -> tuple[tuple[Array, ...], Array]:
    """Pairs of a tuple and an array with a leading axis of the same length -> one such pair."""
    tuples, arrays = zip(*pairs, strict=True)
    return sum(tuples, ()), jnp.concatenate(arrays)


def _scan(step, length: int, in_axes) -> nn.Module:
    return nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
