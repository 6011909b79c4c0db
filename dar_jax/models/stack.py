"""The fused routed stack: a scan over a history buffer, with a backward pass of its own and kernels.

The scan carries the history as one buffer `[K, B, T, D]`. Plain autodiff would save the whole buffer in every
iteration, which is quadratic in depth. The buffer is append-only, so its final value holds every prefix: the forward
pass keeps only that, and the backward pass runs the steps in reverse and accumulates the cotangent of the buffer. It
recomputes each step from the prefix it saw (remat = "block"), or takes what the forward pass saved ("dense").
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.layers import constrain, modulated_norm
from dar_jax.models.numerics import keep_dense_outputs
from dar_jax.models.plain_stack import final_query, first_inputs, make_gate, plain_steps, sublayer_gate, sublayer_query
from dar_jax.routing import (
    Execution,
    Layout,
    Query,
    add_cotangents,
    add_source_cotangent,
    inverse_rms,
    read,
    state,
    statistics_dtype,
    sublayer_input,
)


def execution(implementation: str, mean_count: float) -> Execution:
    """How aggregations run on the current mesh: split as the logical rules split "batch" and "tokens"."""
    if jax.sharding.get_abstract_mesh().empty:
        return Execution(implementation, mean_count=mean_count)
    names = nn.logical_to_mesh_axes(("batch", "tokens"))
    batch_axes, token_axes = ((axes,) if isinstance(axes, str) else axes or () for axes in names)
    return Execution(implementation, batch_axes, token_axes, mean_count)


class Keep(NamedTuple):
    """The first `count` outputs of step `step` are kept."""

    step: int
    count: int


class History(NamedTuple):
    """What the routed scan carries.

    Attributes:
      sources: the buffer, `[K, B, T, D]`; rows not yet appended mean nothing.
      inv_rms: 1 / rms of every row, `[K, B, T]` float32.
      recent: all outputs of the latest step, P times `[B, T, D]`: the final aggregator reads them in full.
      kept: for every hidden state the first outputs of its step, of which it is made.
    """

    sources: Array
    inv_rms: Array
    recent: tuple[Array, ...]
    kept: tuple[tuple[Array, ...], ...]

    @classmethod
    def start(cls, layout: Layout, v_0: Array, implementation: str, keeps: tuple[Keep, ...]) -> "History":
        # Kernels do not read rows that are not filled. XLA multiplies them by zero, so they must be finite.
        new = jnp.zeros if implementation == "xla" else jax.lax.empty
        sources = constrain(new((layout.num_rows, *v_0.shape), v_0.dtype))
        inv_rms = jnp.zeros(sources.shape[:-1], statistics_dtype(v_0))
        outputs = layout.sublayers_per_step * (new(v_0.shape, v_0.dtype),)
        return cls(sources, inv_rms, outputs, tuple(outputs[: keep.count] for keep in keeps)).append(0, v_0[None])

    def append(self, count: Array, rows: Array) -> "History":
        """The history with `rows` from row `count` on."""
        sources = jax.lax.dynamic_update_slice_in_dim(self.sources, rows, count, axis=0)
        new = jnp.stack([inverse_rms(row) for row in rows])  # one by one, where each is computed
        inv_rms = jax.lax.dynamic_update_slice_in_dim(self.inv_rms, new, count, axis=0)
        return self._replace(sources=sources, inv_rms=inv_rms)

    def after(self, layout: Layout, index: Array, outputs: tuple[Array, ...], keeps: tuple[Keep, ...]) -> "History":
        """The history after step `index`."""
        kept = tuple(
            tuple(jnp.where(index == keep.step, new, old) for new, old in zip(outputs, olds, strict=False))
            for keep, olds in zip(keeps, self.kept, strict=True)
        )
        return self.append(layout.count(index), layout.rows(outputs))._replace(recent=outputs, kept=kept)


def queries_per_read(layout: Layout, query: type[Query]) -> int:
    """All queries of a step share a pass over the history if they are known when it starts."""
    return 1 if query.reads_newest else layout.sublayers_per_step


def make_taps(layout: Layout, query: type[Query], v_0: Array) -> list[tuple]:
    """Zeros in the shape of what the taps of the reads of a step get."""
    q = queries_per_read(layout, query)
    num_aggregates = q + layout.is_additive
    aggregates = num_aggregates * (jnp.zeros_like(v_0),)
    tap = aggregates, jnp.zeros((num_aggregates, *v_0.shape[:-1]), statistics_dtype(v_0))
    return layout.sublayers_per_step // q * [tap] if query.reads_newest else [(*tap, aggregates)]


def with_mean(u: tuple[Array, ...], is_additive: bool) -> tuple[Array, ...]:
    """The queries of a read, with one of zeros for additive readers, who need the mean of the rows: its aggregate."""
    return (*u, jnp.zeros_like(u[0])) if is_additive else u


def state_of_reader(gate: Array | None, mean: Array, count: Array, known: tuple) -> Array:
    """The state of a reader, `[B, T, D]`: what routing makes of its sources, or their sum plus gate times that.

    `mean` is that of the `count` filled rows, which only a reader with a gate needs, and `known` the arguments of
    `state`.
    """
    if gate is None:
        return constrain(state(*known))
    recent, wide = known[3], statistics_dtype(mean)
    stream = sum((v.astype(wide) for v in recent), count * mean.astype(wide))
    return constrain((stream + gate * state(*known)).astype(mean.dtype))


def reader_input(
    how: Execution, gate: Array | None, mean: Array, count: Array, known: tuple, shift: Array, scale: Array
) -> tuple[Array, tuple[Array, ...]]:
    """As `sublayer_input`, with its kernels for a reader without a gate; gate, mean, count and known as above."""
    if gate is None:
        x, recent = sublayer_input(how, *known, shift, scale)
    else:
        x, recent = modulated_norm(state_of_reader(gate, mean, count, known), shift, scale), known[3]
    return constrain(x), recent


class Reader:
    """The aggregators of a stream in one step, which is read and written in turn.

    Args:
      how: implementation.
      queries: modules, one for each of the P sublayers, of `size` per read.
      e_t: embedding of the time, `[B, D]`.
      history: what earlier steps wrote; `count` rows are filled, and `newest` is the last of them.
      taps: None, or of `make_taps`: then the history gets no cotangent (`read`).
      gates: of additive readers, one for each sublayer; none of others.

    Attributes:
      recent: the outputs written so far, `[B, T, D]` each.
      reads: the queries and log sums of the reads so far, queries in the type of the history.
    """

    def __init__(
        self, how, queries: list[Query], size: int, e_t, history: History, count, newest, taps: list | None, gates=()
    ):
        self.how, self.queries, self.size, self.e_t, self.gates = how, queries, size, e_t, gates
        self.history, self.count, self.newest, self.taps = history, count, newest, taps
        self.recent, self.norms, self.reads = (), (), []

    def read(self, shift: Array, scale: Array) -> Array:
        """What the next sublayer reads, `[B, T, D]`, after LayerNorm and modulation."""
        number, i = divmod(len(self.recent), self.size)
        if i == 0:
            newest = self.recent[-1] if self.recent else self.newest
            u = tuple(query(self.e_t, newest) for query in self.queries[len(self.recent) :][: self.size])
            u = with_mean(u, bool(self.gates))
            tap = self.taps[number] if self.taps else None
            sources = self.history.sources
            self.u, (self.aggregates, log_sum) = u, read(self.how, u, sources, self.history.inv_rms, self.count, tap)
            self.reads.append((tuple(x.astype(sources.dtype) for x in u), log_sum))  # as kernels take them
        log_sum = self.reads[-1][1]
        read_by_sublayer = self.u[i], self.aggregates[i], log_sum[i], self.recent, self.norms
        gate, mean = self.gates[len(self.recent)] if self.gates else None, self.aggregates[-1]
        x, self.recent = reader_input(self.how, gate, mean, self.count, read_by_sublayer, shift, scale)
        return x

    def write(self, output: Array) -> None:
        """Takes the output of the sublayer that has just read."""
        self.recent += (constrain(output),)
        self.norms += (inverse_rms(self.recent[-1]),)


def read_history(
    implementation: str, is_additive: bool, query, e_t: Array, history: History, recent: tuple[Array, ...], count: int
) -> tuple[tuple, Array]:
    """The arguments of `state` for a reader of the first `count` rows and the recent outputs.

    And the last aggregate of the read, `[B, T, D]`, which is the mean of these rows if the reader is additive.
    """
    u = with_mean((query(e_t, recent[-1] if recent else history.sources[count - 1]),), is_additive)
    rows = history.sources, history.inv_rms, jnp.int32(count)
    aggregates, log_sum = read(execution(implementation, count), u, *rows)
    known = u[0], aggregates[0], log_sum[0], recent, tuple(inverse_rms(v) for v in recent)
    return known, aggregates[-1]


class RoutedStep(nn.Module):
    """P sublayers, each fed by its own aggregator over the history and the recent outputs of this step."""

    block: Callable[..., nn.Module]
    layout: Layout
    query: type[Query]
    implementation: str

    @nn.compact
    def __call__(
        self, history: History, index: Array, newest: Array, condition: Array, e_t: Array, taps: list | None = None
    ) -> tuple[tuple[Array, ...], list[tuple[tuple[Array, ...], Array]]]:
        """The sublayer outputs of step `index`, P times `[B, T, D]`, and the queries and log sums of its reads.

        `newest` is the last row of the history that is filled. With `taps` the history gets no cotangent (`read`).
        """
        how = execution(self.implementation, self.layout.mean_count)
        blocks = [self.block(name=f"block_{i}") for i in range(self.layout.sublayers_per_step // 2)]
        queries = [self.query(name=f"query_{j}") for j in range(self.layout.sublayers_per_step)]
        gates = [make_gate(self, self.layout, f"gate_{j}") for j in range(len(queries)) if self.layout.is_additive]
        size, count = queries_per_read(self.layout, self.query), self.layout.count(index)
        reader = Reader(how, queries, size, e_t, history, count, newest, taps, gates)
        for branch, shift, scale, gate in (branch for block in blocks for branch in block.branches(condition)):
            reader.write(branch(reader.read(shift, scale), gate))
        return reader.recent, reader.reads


class RoutedStack(nn.Module):
    """`layout.depth` blocks routed by DAR and the final aggregator: `[B, T, D]` -> what the head reads, `[B, T, D]`.

    Also returns what the block after each block of `hidden_at` reads, `[B, T, D]`.
    """

    block: Callable[..., nn.Module]
    layout: Layout
    query: type[Query]
    implementation: str
    remat: str

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        layout, steps, e_t = self.layout, plain_steps(self), self.query.given(self, e_t)
        places = [layout.sources_of(2 * k) for k in hidden_at]
        keeps = tuple(Keep(step, num_recent) for _, step, num_recent in places)
        if self.is_initializing():  # the plain steps make the parameters
            steps(*first_inputs(layout, v_0), condition, e_t)
            history = History.start(layout, v_0, self.implementation, keeps)
        else:
            step = RoutedStep(self.block, layout, self.query, self.implementation, parent=None)
            run = Run(step, self.remat, keeps)
            history = run_steps(run, steps.variables["params"], v_0, condition, e_t)

        look = partial(read_history, self.implementation, layout.is_additive)
        recent, count = history.recent if layout.final_set.sees_outputs else (), layout.num_final_rows
        known, mean = look(final_query(self, steps), e_t, history, recent, count)
        gate, how = make_gate(self, layout, "final_gate"), execution(self.implementation, count)
        x, _ = reader_input(how, gate, mean, count, known, shift, scale)
        hidden = []
        for k, kept, (count, _, _) in zip(hidden_at, history.kept, places, strict=True):
            known, mean = look(sublayer_query(self, steps, 2 * k), e_t, history, kept, count)
            gate = sublayer_gate(layout, steps, 2 * k)
            hidden.append(state_of_reader(gate, mean, count, known))
        return x, tuple(hidden)


class Run(NamedTuple):
    """How `run_steps` runs.

    Attributes:
      step: as a pure function.
      remat: "block" or "dense".
      keeps: what is kept for the hidden states.
    """

    step: RoutedStep
    remat: str
    keeps: tuple[Keep, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_steps(run: Run, params: dict, v_0: Array, condition: Array, e_t: Array) -> History:
    """All steps on the history that starts with v_0; `params` of `step` have a leading axis of steps."""
    return _run_steps_forward(run._replace(remat="block"), params, v_0, condition, e_t)[0]


def _run_steps_forward(run, params, v_0, condition, e_t):
    step, layout = run.step, run.step.layout

    def advance(history, inputs):
        index, step_params = inputs
        newest = history.sources[layout.count(index) - 1]
        known = history, newest, step_params, condition, e_t
        if run.remat == "block":
            outputs, saved = step.apply({"params": step_params}, history, index, newest, condition, e_t)[0], None
        else:
            outputs, linear = _linearize(step, index, *known)
            saved = save(linear, known)
        return history.after(layout, index, outputs, run.keeps), saved

    start = History.start(layout, v_0, step.implementation, run.keeps)
    history, saved = jax.lax.scan(advance, start, (jnp.arange(layout.num_steps), params))
    return history, (params, history, condition, e_t, saved)


def _run_steps_backward(run, residuals, d_final: History):
    step, layout = run.step, run.step.layout
    params, history, condition, e_t, saved = residuals
    how = execution(step.implementation, layout.mean_count)

    def reverse(carry, inputs):
        d_sources, d_condition, d_e_t = carry
        index, step_params, saved = inputs
        # The final buffer stands for the one this step saw: a step reads only rows that were filled before it.
        known = history, history.sources[layout.count(index) - 1], step_params, condition, e_t
        vjp, reads = _linearize(step, index, *known)[1] if saved is None else saved(known)
        d_params, d_newest, d_c, d_e, d_taps = vjp(output_cotangents(layout, run.keeps, index, d_sources, d_final))
        names = [f"query_{j}" for j in range(layout.sublayers_per_step)]
        known = how, history, layout.count(index), step.query, names, step_params, e_t, reads
        d_sources, d_params, d_e = read_cotangents(known, d_taps, d_sources, d_newest, d_params, d_e)
        return (d_sources, d_condition + d_c, d_e_t + d_e), d_params

    carry = d_final.sources, jnp.zeros_like(condition), jnp.zeros_like(e_t)
    inputs = jnp.arange(layout.num_steps), params, saved
    (d_sources, d_condition, d_e_t), d_params = jax.lax.scan(reverse, carry, inputs, reverse=True)
    return d_params, d_sources[0], d_condition, d_e_t


run_steps.defvjp(_run_steps_forward, _run_steps_backward)


def _linearize(
    step: RoutedStep, index: Array, history: History, newest: Array, params: dict, condition: Array, e_t: Array
):  # fmt: skip
    """The outputs of step `index`, and its linear part: the vjp and the reads.

    Of a step it keeps the outputs of dense layers alone. To aggregate anew costs less than to write what was aggregated
    to a buffer over all steps, and to read it from there.
    """

    @partial(jax.checkpoint, policy=keep_dense_outputs, prevent_cse=False)
    def outputs(params, *inputs):
        return step.apply({"params": params}, history, index, *inputs)

    taps = make_taps(step.layout, step.query, history.sources[0])
    values, vjp, reads = jax.vjp(outputs, params, newest, condition, e_t, taps, has_aux=True)
    return values, (vjp, reads)


def output_cotangents(
    layout: Layout, keeps: tuple[Keep, ...], index: Array, d_sources: Array, d_final: History
) -> tuple[Array, ...]:
    """Of the outputs of step `index`: from the rows it appended, and from what outside the scan reads the outputs.

    The final aggregator reads those of the last step, a hidden state those that are kept.
    """
    is_last = index == layout.num_steps - 1
    d_rows = jax.lax.dynamic_slice_in_dim(d_sources, layout.count(index), layout.rows_per_step)
    (d_outputs,) = jax.linear_transpose(layout.rows, d_final.recent)(d_rows)
    d_outputs = [d + jnp.where(is_last, r, 0) for d, r in zip(d_outputs, d_final.recent, strict=True)]
    for keep, d_kept in zip(keeps, d_final.kept, strict=True):
        for i, d in enumerate(d_kept):
            d_outputs[i] += jnp.where(index == keep.step, d, 0)
    return tuple(d_outputs)


def read_cotangents(
    known: tuple, d_taps: list, d_sources: Array, d_newest: Array, d_params: dict, d_e_t: Array
) -> tuple:
    """Adds what the reads of a step hand back to the cotangents of the sources, of params and of e(t).

    Args:
      known: how, history, count, the query and the names of its modules in a step, params of the step, e(t), and the
        reads (`Reader`).
      d_taps: what their taps got.
      d_sources, d_newest, d_params, d_e_t: cotangents so far: of the history, of the newest source as an argument of a
        query, of the params of the step and of e(t).
    """
    how, history, count, query, names, params, e_t, reads = known
    u, log_sum = join(reads)
    rows = history.sources, history.inv_rms, count
    if query.reads_newest:
        d_sources = add_source_cotangent(how, d_sources, u, *rows, log_sum, *join(d_taps))
        return d_sources.at[count - 1].add(d_newest), d_params, d_e_t

    ((g, l, aggregates),) = d_taps
    d_sources, d_u = add_cotangents(how, d_sources, u, *rows, aggregates, log_sum, g, l)
    own = {name: params[name] for name in names if name in params}

    def queries(own, e_t):
        return tuple(query(parent=None).apply({"params": own.get(name, {})}, e_t, None) for name in names)

    u, vjp = jax.vjp(queries, own, e_t)
    d_own, d_e = vjp(tuple(d.astype(x.dtype) for d, x in zip(d_u[: len(u)], u, strict=True)))
    added = {name: jax.tree.map(jnp.add, d_params[name], d) for name, d in d_own.items()}
    return d_sources, {**d_params, **added}, d_e_t + d_e


def save(tree, known) -> jax.tree_util.Partial:
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


def join(pairs: list) -> tuple[tuple[Array, ...], Array]:
    """Pairs of a tuple and an array with a leading axis of the same length -> one such pair."""
    tuples, arrays = zip(*pairs, strict=True)
    return sum(tuples, ()), jnp.concatenate(arrays)
