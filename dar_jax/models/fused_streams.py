"""The fused form of the routed streams of two_streams.py: kernels, and a gradient whose memory is linear in depth.

It does for two streams what stack.py does for one. A routed stream has a history, whose final buffer holds every prefix
that the backward pass needs. A residual stream beside it is saved before every step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.layers import constrain, modulated_norm
from dar_jax.models.numerics import keep_dense_outputs
from dar_jax.models.stack import (
    History,
    Keep,
    Reader,
    execution,
    make_taps,
    output_cotangents,
    queries_per_read,
    read_cotangents,
    read_history,
    save,
)
from dar_jax.routing import Layout, state

NAMES = "text", "image"


class ResidualReader:
    """A residual stream in one step, with the interface of `Reader`: `recent` is the stream itself."""

    def __init__(self, h: Array):
        self.recent, self.reads = h, []

    def read(self, shift: Array, scale: Array) -> Array:
        return constrain(modulated_norm(self.recent, shift, scale))

    def write(self, output: Array) -> None:
        self.recent = constrain(self.recent + output)


class FusedStep(nn.Module):
    """P sublayers in each stream. The image is routed; the text may be."""

    block: Callable[..., nn.Module]
    kinds: tuple[Any, Any]
    implementation: str

    @property
    def layout(self) -> Layout:
        return self.kinds[-1].layout

    @nn.compact
    def __call__(
        self, histories: tuple, index: Array, entries: tuple[Array, Array], e_t: Array, by: tuple, key_mask: Array,
        taps: tuple = (None, None),
    ) -> tuple[tuple, tuple]:  # fmt: skip
        """For each stream what step `index` returns, and the queries and log sums of its reads.

        A routed stream enters as its history and the last filled row of it, and returns its outputs, P times
        `[B, T, D]`. A residual stream has no history, enters as itself, and returns itself after the step.
        """
        layout = self.layout
        how, count = execution(self.implementation, layout.mean_count), layout.count(index)
        readers = []
        for name, kind, history, entry, tap in zip(NAMES, self.kinds, histories, entries, taps, strict=True):
            if kind.num_queries:
                queries = [kind.query(name=f"{name}_query_{j}") for j in range(layout.sublayers_per_step)]
                size = queries_per_read(layout, kind.query)
                readers.append(Reader(how, queries, size, e_t, history, count, entry, tap))
            else:
                readers.append(ResidualReader(entry))
        for i in range(layout.sublayers_per_step // 2):
            for sublayers, modulations in self.block(name=f"block_{i}").pairs(e_t, by, key_mask):
                xs = [r.read(shift, scale) for r, (shift, scale, _) in zip(readers, modulations, strict=True)]
                for reader, output, (_, _, gate) in zip(readers, sublayers(*xs), modulations, strict=True):
                    reader.write(gate * output)
        return tuple(reader.recent for reader in readers), tuple(reader.reads for reader in readers)

    def start(self, v_0: tuple[Array, Array], keeps: tuple) -> tuple:
        """The states of the streams before all steps: a history, or the stream."""
        return tuple(
            History.start(self.layout, v, self.implementation, keep) if kind.num_queries else v
            for kind, v, keep in zip(self.kinds, v_0, keeps, strict=True)
        )

    def after(self, states: tuple, index: Array, outputs: tuple, keeps: tuple) -> tuple:
        """The states after step `index`."""
        return tuple(
            old.after(self.layout, index, new, keep) if kind.num_queries else new
            for kind, old, new, keep in zip(self.kinds, states, outputs, keeps, strict=True)
        )

    def histories(self, states: tuple) -> tuple:
        """The histories of routed streams; residual streams have none."""
        return tuple(s if kind.num_queries else () for kind, s in zip(self.kinds, states, strict=True))

    def entries(self, states: tuple, index: Array) -> tuple[Array, Array]:
        """What enters step `index` besides the histories."""
        newest = self.layout.count(index) - 1
        return tuple(s.sources[newest] if kind.num_queries else s for kind, s in zip(self.kinds, states, strict=True))

    def params_by_name(self, stacked: dict) -> dict:
        """The params of a step from those of its blocks and aggregators, stacked on a leading axis."""
        named = {f"block_{i}": _index(stacked["block"], i) for i in range(self.layout.sublayers_per_step // 2)}
        for name, kind in zip(NAMES, self.kinds, strict=True):
            for j in range(self.layout.sublayers_per_step if kind.num_queries else 0):
                named[f"{name}_query_{j}"] = _index(stacked[f"{name}_query"], j)
        return named

    @staticmethod
    def stack_params(named: dict) -> dict:
        """The inverse of `params_by_name`."""
        groups: dict[str, list] = {}
        for name in sorted(named, key=lambda name: int(name.rpartition("_")[2])):
            groups.setdefault(name.rpartition("_")[0], []).append(named[name])
        return {group: jax.tree.map(lambda *p: jnp.stack(p), *members) for group, members in groups.items()}


def _index(tree: dict, i: int | tuple[int, int]) -> dict:
    return jax.tree.map(lambda p: p[i], tree)


class Run(NamedTuple):
    """How `run_steps` runs.

    Attributes:
      step: as a pure function.
      remat: "block" or "dense".
      keeps: for each stream what is kept for hidden states.
    """

    step: FusedStep
    remat: str
    keeps: tuple[tuple[Keep, ...], tuple[Keep, ...]]


def fused_streams(
    run: tuple[FusedStep, str], params: dict, final_query: Callable[[Array, Array], Array], inputs: tuple,
    hidden_at: tuple[int, ...],
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    """What the head reads of the image, and what the image stream of blocks reads, as `two_streams.Stack` returns them.

    Args:
      run: the step and `remat`.
      params: of the "block"s, `[depth, ...]`, and of the aggregators, "image_query" and perhaps "text_query",
        `[depth, 2, ...]`.
      final_query: of the head's aggregator.
      inputs: those of `two_streams.Stack` but `hidden_at`.
    """
    step, remat = run
    layout, (_, e_t, *_) = step.layout, inputs

    def by_step(tree: dict, leading: int) -> dict:
        return jax.tree.map(lambda p: p.reshape(layout.num_steps, -1, *p.shape[leading:]), tree)

    places = [layout.sources_of(2 * k) for k in hidden_at]
    keeps = (), tuple(Keep(number, num_recent) for _, number, num_recent in places)
    stacked = {name: by_step(tree, 1 if name == "block" else 2) for name, tree in params.items()}
    _, image = run_steps(Run(step, remat, keeps), stacked, *inputs)

    def look(query, recent: tuple[Array, ...], count: int) -> Array:
        known, _ = read_history(step.implementation, False, query, e_t, image, recent, count)
        return constrain(state(*known))

    recent = image.recent if layout.final_set.sees_outputs else ()
    h = look(final_query, recent, layout.num_final_rows)
    hidden = []
    for k, kept, (count, _, _) in zip(hidden_at, image.kept, places, strict=True):
        query = partial(step.kinds[-1].query(parent=None).apply, {"params": _index(params["image_query"], (k, 0))})
        hidden.append(look(query, kept, count))
    return h, tuple(hidden)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_steps(run: Run, params: dict, v_0: tuple[Array, Array], e_t: Array, by: tuple, key_mask: Array) -> tuple:
    """The states of the streams after all steps; `params` have leading axes of steps and of members of a step."""
    return _run_steps_forward(run._replace(remat="block"), params, v_0, e_t, by, key_mask)[0]


def _run_steps_forward(run, params, v_0, e_t, by, key_mask):
    step = run.step

    def advance(states, inputs):
        index, stacked = inputs
        entries = step.entries(states, index)
        of_histories = tuple(e if kind.num_queries else () for kind, e in zip(step.kinds, entries, strict=True))
        known = of_histories, step.histories(states), step.params_by_name(stacked), e_t, by, key_mask
        if run.remat == "block":
            _, histories, named, *context = known
            outputs = step.apply({"params": named}, histories, index, entries, *context)[0]
            saved = tuple(() if kind.num_queries else s for kind, s in zip(step.kinds, states, strict=True))
        else:
            outputs, linear = _linearize(step, index, entries, *known[1:])
            saved = save(linear, known)
        return step.after(states, index, outputs, run.keeps), saved

    states, saved = jax.lax.scan(advance, step.start(v_0, run.keeps), (jnp.arange(step.layout.num_steps), params))
    return states, (params, step.histories(states), e_t, by, key_mask, saved)


def _run_steps_backward(run, residuals, d_final):
    step, layout = run.step, run.step.layout
    params, histories, e_t, by, key_mask, saved = residuals
    how = execution(step.implementation, layout.mean_count)

    def reverse(carry, inputs):
        d_states, d_e_t = carry
        index, stacked, saved = inputs
        # The final buffers stand for those this step saw: a step reads only rows that were filled before it.
        known = step.entries(histories, index), histories, step.params_by_name(stacked), e_t, by, key_mask
        if run.remat == "block":
            states = tuple(h or s for h, s in zip(histories, saved, strict=True))
            vjp, reads = _linearize(step, index, step.entries(states, index), *known[1:])[1]
        else:
            vjp, reads = saved(known)
        d_outputs = tuple(
            output_cotangents(layout, keeps, index, d, last) if kind.num_queries else d
            for kind, keeps, d, last in zip(step.kinds, run.keeps, d_states, d_final, strict=True)
        )
        d_named, d_entries, d_e, d_taps = vjp(d_outputs)

        count, params, d_before = layout.count(index), known[2], []
        for name, kind, history, d, d_entry, d_tap, read in zip(
            NAMES, step.kinds, histories, d_states, d_entries, d_taps, reads, strict=True
        ):
            if not kind.num_queries:
                d_before.append(d_entry)
                continue
            names = [f"{name}_query_{j}" for j in range(layout.sublayers_per_step)]
            reads_known = how, history, count, kind.query, names, params, e_t, read
            d, d_named, d_e = read_cotangents(reads_known, d_tap, d, d_entry, d_named, d_e)
            d_before.append(d)
        return (tuple(d_before), d_e_t + d_e), step.stack_params(d_named)

    d_states = tuple(d.sources if kind.num_queries else d for kind, d in zip(step.kinds, d_final, strict=True))
    inputs = jnp.arange(layout.num_steps), params, saved
    (d_states, d_e_t), d_params = jax.lax.scan(reverse, (d_states, jnp.zeros_like(e_t)), inputs, reverse=True)
    d_v_0 = tuple(d[0] if kind.num_queries else d for kind, d in zip(step.kinds, d_states, strict=True))
    return d_params, d_v_0, d_e_t, None, None


run_steps.defvjp(_run_steps_forward, _run_steps_backward)


def _linearize(step: FusedStep, index: Array, entries, histories, params: dict, e_t: Array, by, key_mask: Array):
    """See `stack._linearize`."""

    @partial(jax.checkpoint, policy=keep_dense_outputs, prevent_cse=False)
    def outputs(params, entries, e_t, taps):
        return step.apply({"params": params}, histories, index, entries, e_t, by, key_mask, taps)

    taps = tuple(
        make_taps(kind.layout, kind.query, entry) if kind.num_queries else ()
        for kind, entry in zip(step.kinds, entries, strict=True)
    )
    values, vjp, reads = jax.vjp(outputs, params, entries, e_t, taps, has_aux=True)
    return values, (vjp, reads)
