"""Softmax over depth: `h = sum_k alpha_k v_k`, `alpha = softmax_k(u . v_k / rms(v_k))` (paper Eq. 5).

`u` is the query with the norm's scale and 1/sqrt(D) folded in (queries.py). The sources of an aggregator come in
two parts: the filled rows of the history buffer, which `read` aggregates for many queries at once, and the recent
outputs of the current step, which `sublayer_input` adds, one pass from there to what the sublayer reads. Statistics,
scores and weights are float32; sources may be bfloat16.

The passes are in kernels/, for XLA and fused: both directions of these two, and the cotangent of the history, which is
added for all reads of a step at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from dar_jax.routing.kernels import gpu, tpu, xla

IMPLEMENTATIONS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How aggregations run; it does not change what they compute.

    Attributes:
      implementation: "xla", "pallas" (on a CPU interpreted, for tests), or "auto": kernels where the platform has them.
      batch_axes, token_axes: mesh axes over which samples and tokens are split: the compiler cannot split a kernel by
        itself. A batch that they do not divide (of a single sample, at initialisation) runs whole on every device.
      mean_count: mean of `count` over all reads; only the declared cost of kernels depends on it. None: all rows.
    """

    implementation: str = "auto"
    batch_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    mean_count: float | None = None

    def run(
        self, passes: tuple[Callable, Callable, Callable], args: tuple, arg_axes: tuple[P, ...], result_axes, **declared
    ):
        """Runs a pass over arrays `[..., B, T, D]` on every device that holds a part of them.

        Args:
          passes: the pass for XLA, TPU and GPU.
          args: arrays, tuples of them, or None.
          arg_axes, result_axes: `P` of the leading axes of each argument and result, which says what are "samples" and
            "tokens"; all arrays of a tuple are alike. A result without tokens is a sum over them.
          declared: what only the cost of the kernels depends on.
        """
        plain, on_tpu, on_gpu = passes
        if self.implementation == "xla" or jax.tree.leaves(args)[0].dtype == jnp.float64:
            return plain(*args)
        on_tpu, on_gpu = (functools.partial(kernel, **declared) for kernel in (on_tpu, on_gpu))
        elsewhere = plain if self.implementation == "auto" else functools.partial(on_tpu, interpret=True)
        choose = functools.partial(jax.lax.platform_dependent, tpu=on_tpu, cuda=on_gpu, default=elsewhere)

        mesh_axes = {"samples": self.batch_axes, "tokens": self.token_axes, None: ()}
        for axes, group in zip(arg_axes, args, strict=True):
            for array in jax.tree.leaves(group):
                for axis, size in zip(axes, array.shape, strict=False):
                    mesh_axes[axis] = self._dividing(mesh_axes[axis], size)
        if not any(mesh_axes.values()):
            return choose(*args)

        def local(*args):
            """The part of one device."""
            add_up = lambda axes, x: jax.lax.psum(x, mesh_axes["tokens"]) if axes == SHARED else x  # noqa: E731
            results = choose(*args)
            return jax.tree.map(add_up, result_axes, results) if mesh_axes["tokens"] else results

        in_specs, out_specs = jax.tree.map(lambda axes: P(*(mesh_axes[a] for a in axes)), (arg_axes, result_axes))
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    @staticmethod
    def _dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
        """The axes, or none where they do not divide `size` or there is nothing to divide."""
        parts = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
        return axes if parts > 1 and size % parts == 0 else ()


# Leading axes of what passes take and return (`Execution.run`).
EACH = P("samples", "tokens")
SHARED = P("samples")  # one for all tokens of a sample
ROWS = P(None, "samples", "tokens")
WHOLE = P()


def _axes_of_queries(u: tuple[Array, ...]) -> P:
    return EACH if u and u[0].shape[1] > 1 else SHARED


def inverse_rms(v: Array) -> Array:
    """1 / rms over the last axis in float32: `[..., D]` -> `[...]`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(v.astype(xla.statistics_dtype(v))), axis=-1) + xla.EPS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(
    how: Execution, u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array, tap=None
) -> tuple[tuple[Array, ...], Array]:
    """Aggregates the first `count` rows of the history for Q queries at once.

    Args:
      how: implementation.
      u: folded queries, Q times `[B, 1 or T, D]`.
      sources: `[K, B, T, D]`; rows from `count` on are ignored, whatever finite values they hold.
      inv_rms: `inverse_rms(sources)`, `[K, B, T]`. No cotangent is returned for it: the one of `sources` already
        accounts for the norm.
      count: filled rows, at least 1, int32 scalar.
      tap: None, or zeros in the shape of what it gets. With a tap the sources get no cotangent, and queries that all
        tokens share get none either. Instead the tap gets what the caller needs to compute them for several reads in
        one pass: for `add_cotangents`, if the queries are shared, cotangents of the result and the aggregates;
        otherwise, for `add_source_cotangent`, its arguments g and l.

    Returns:
      The aggregates over these rows, Q times `[B, T, D]` in the type of the sources, and the logs of their softmax
      denominators, float32 `[Q, B, T]`, with which `sublayer_input` adds further sources.
    """
    return _read_forward(how, u, sources, inv_rms, count, tap)[0]


def _like(sources: Array, u: tuple[Array, ...]) -> tuple[Array, ...]:
    """Queries in the type of the sources, as kernels take them."""
    return tuple(u_q.astype(sources.dtype) for u_q in u)


def _read_forward(how, u, sources, inv_rms, count, tap):
    passes = xla.forward, tpu.forward, gpu.forward
    args, axes = (_like(sources, u), sources, inv_rms, count), (_axes_of_queries(u), ROWS, ROWS, WHOLE)
    result = how.run(passes, args, axes, (EACH, ROWS), mean_count=how.mean_count)
    parts_of_tap = None if tap is None else len(tap) * ((),)
    return result, (u, sources, inv_rms, count, parts_of_tap, *result)


def _read_backward(how, residuals, cotangents):
    u, sources, inv_rms, count, parts_of_tap, aggregates, log_sum = residuals
    g, l = cotangents
    if parts_of_tap and len(parts_of_tap) == 3:
        return None, None, None, None, (g, l, aggregates)
    known = _like(sources, u), sources, inv_rms, count, aggregates, log_sum, g, l
    if u[0].shape[1] == 1 and not parts_of_tap:
        d_sources, d_u = add_cotangents(how, None, *known)
        return _with_types(d_u, u), d_sources, None, None, None
    passes = xla.query_cotangent, tpu.query_cotangent, gpu.query_cotangent
    axes = EACH, ROWS, ROWS, WHOLE, EACH, ROWS, EACH, ROWS
    d_u, l = how.run(passes, known, axes, (EACH, ROWS), mean_count=how.mean_count)
    if parts_of_tap:
        return _with_types(d_u, u), None, None, None, (g, l)
    d_sources = add_source_cotangent(how, None, u, sources, inv_rms, count, log_sum, g, l)
    return _with_types(d_u, u), d_sources, None, None, None


def _with_types(d_u, u) -> tuple[Array, ...]:
    return tuple(d.astype(u_q.dtype) for d, u_q in zip(d_u, u, strict=True))


read.defvjp(_read_forward, _read_backward)


def add_cotangents(
    how, d_sources, u, sources, inv_rms, count, aggregates, log_sum, g, l
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    """Adds the cotangent of the sources of a tapped read by Q shared queries to `d_sources`, `[K, B, T, D]`.

    Args:
      d_sources: cotangent so far, or None: there is none yet.
      how, sources, inv_rms, count: as in `read`.
      u: queries of the read, Q times `[B, 1, D]`; `aggregates` and `log_sum`: its result.
      g, l: cotangents of the result, Q times `[B, T, D]` and `[Q, B, T]`.

    Returns:
      The sum, and the cotangents of the queries, float32.
    """
    passes = xla.cotangents, tpu.cotangents, gpu.cotangents
    args = d_sources, _like(sources, u), sources, inv_rms, count, aggregates, log_sum, g, l
    axes = ROWS, SHARED, ROWS, ROWS, WHOLE, EACH, ROWS, EACH, ROWS
    return how.run(passes, args, axes, (ROWS, SHARED), mean_count=how.mean_count)


def add_source_cotangent(how, d_sources, u, sources, inv_rms, count, log_sum, g, l) -> Array:
    """Adds the cotangent of the sources of tapped reads by Q queries per token to `d_sources`, in one pass.

    u, log_sum, g and l are of all reads, Q times `[B, T, D]` and `[Q, B, T]`, where taps got the latter two. The others
    are as in `add_cotangents`.
    """
    passes = xla.add_source_cotangent, tpu.add_source_cotangent, gpu.add_source_cotangent
    args = d_sources, _like(sources, u), sources, inv_rms, count, log_sum, g, l
    return how.run(passes, args, (ROWS, EACH, ROWS, ROWS, WHOLE, ROWS, EACH, ROWS), ROWS, mean_count=how.mean_count)


def state(u: Array, aggregate: Array, log_sum: Array, recent: tuple[Array, ...], inv_rms: tuple[Array, ...]) -> Array:
    """The state h `[B, T, D]` that `sublayer_input` normalises, by plain autodiff, from the same arguments."""
    scores = [jnp.sum(u * v, axis=-1) * r for v, r in zip(recent, inv_rms, strict=True)]
    weights = jax.nn.softmax(jnp.stack([log_sum, *scores]), axis=0)[..., None]
    return sum(w * v for w, v in zip(weights, (aggregate, *recent), strict=True)).astype(aggregate.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sublayer_input(
    how: Execution, u: Array, aggregate: Array, log_sum: Array, recent: tuple[Array, ...], inv_rms: tuple[Array, ...],
    shift: Array, scale: Array,
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    """What a sublayer reads: recent sources join an aggregate of the history, then LayerNorm and modulation.

    Args:
      how: implementation.
      u: folded query, float32 `[B, 1 or T, D]`.
      aggregate: `[B, T, D]` and its `log_sum` `[B, T]`, from `read`.
      recent: sources `[B, T, D]` of the current step, possibly none.
      inv_rms: their `inverse_rms`, `[B, T]`, of which each source has one for all its readers. As in `read`, no
        cotangent is returned for it.
      shift, scale: `[B, 1, D]`.

    Returns:
      LayerNorm(h) * (1 + scale) + shift, where h is the state aggregated over all: `[B, T, D]` in the type of the
      aggregate, computed in float32. And `recent` as it was given: who reads that from here on hands its cotangent back
      to this function, which adds its own in the same pass.
    """
    return _sublayer_input_forward(how, u, aggregate, log_sum, recent, inv_rms, shift, scale)[0]


def _sublayer_input_forward(how, u, aggregate, log_sum, recent, inv_rms, shift, scale):
    queries = _like(aggregate, (u,)) if recent else ()
    passes = xla.sublayer_input, tpu.sublayer_input, gpu.sublayer_input
    args = queries, (aggregate, *recent), (log_sum, *inv_rms), (shift, scale)
    (x,) = how.run(passes, args, (_axes_of_queries(queries), EACH, EACH, SHARED), (EACH,))
    return (x, recent), (u, args)


def _sublayer_input_backward(how, residuals, cotangents):
    u, args = residuals
    g, d_recent = cotangents
    passes = xla.sublayer_input_cotangents, tpu.sublayer_input_cotangents, gpu.sublayer_input_cotangents
    per_query = _axes_of_queries(args[0])
    axes, result_axes = (per_query, EACH, EACH, SHARED, EACH, EACH), (per_query, EACH, EACH, SHARED)
    d_u, d_values, d_log_sum, d_modulation = how.run(passes, (*args, (g,), d_recent), axes, result_axes)
    d_u = d_u[0].astype(u.dtype) if d_u else jnp.zeros_like(u)
    d_modulation = (d.astype(m.dtype) for d, m in zip(d_modulation, args[-1], strict=True))
    return d_u, d_values[0], *d_log_sum, d_values[1:], None, *d_modulation


sublayer_input.defvjp(_sublayer_input_forward, _sublayer_input_backward)
