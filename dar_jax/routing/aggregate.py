"""Softmax over depth: `h = sum_k alpha_k v_k`, `alpha = softmax_k(u . v_k / rms(v_k))` (paper Eq. 5).

`u` is the query with the norm's scale and 1/sqrt(D) folded in (queries.py). The sources of an aggregator come in
two parts: the filled rows of the history buffer, read by `read`, and the recent outputs of the current step, merged
in by `merge`. Statistics, scores and weights are float32; sources may be bfloat16.

The passes over the history are in kernels/, for XLA and as fused kernels: the forward pass, the cotangent of the query,
and the cotangent of the sources, which is added for all reads of a step at once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from dar_jax.routing.kernels import gpu, tpu, xla

EPS = 1e-6


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

    def run(self, name, *args):
        """The function `name` of a module in kernels/.

        Samples and tokens are axes 0 and 1 of arrays in tuples, of which there is a tuple of queries first, and axes 1
        and 2 of other arrays.
        """
        plain = getattr(xla, name)
        if self.implementation == "xla" or jax.tree.leaves(args)[0].dtype == jnp.float64:
            return plain(*args)
        on_tpu = functools.partial(getattr(tpu, name), mean_count=self.mean_count)
        elsewhere = plain if self.implementation == "auto" else functools.partial(on_tpu, interpret=True)

        def choose(*args):
            return jax.lax.platform_dependent(*args, tpu=on_tpu, cuda=getattr(gpu, name), default=elsewhere)

        queries = next(x[0] for x in args if isinstance(x, tuple))  # [B, 1 or T, D]
        batch_axes = self._dividing(self.batch_axes, queries.shape[0])
        token_axes = self._dividing(self.token_axes, next(x.shape[2] for x in args if getattr(x, "ndim", 0) > 2))
        if not batch_axes + token_axes:
            return choose(*args)
        tokens, rows = PartitionSpec(batch_axes, token_axes), PartitionSpec(None, batch_axes, token_axes)
        per_query = tokens if queries.shape[1] > 1 else PartitionSpec(batch_axes)

        def spec(x):
            if isinstance(x, tuple):
                return tokens if x[0].shape[1] > 1 else per_query
            return rows if x.ndim else PartitionSpec()

        def local(*args):
            result = choose(*args)
            if name == "query_cotangent" and token_axes and queries.shape[1] == 1:
                return jax.lax.psum(result[0], token_axes), result[1]
            return result

        out_specs = {
            "forward": (tokens, rows), "query_cotangent": (per_query, rows), "add_source_cotangent": rows
        }[name]  # fmt: skip
        specs = tuple(spec(x) for x in args)
        return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)

    @staticmethod
    def _dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
        """The axes, or none where they do not divide `size` or there is nothing to divide."""
        parts = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
        return axes if parts > 1 and size % parts == 0 else ()


def inverse_rms(v: Array) -> Array:
    """1 / rms over the last axis in float32: `[..., D]` -> `[...]`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(v.astype(xla.statistics_dtype(v))), axis=-1) + EPS)


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
      tap: None, or zeros in the shape of the result. With a tap the sources get no cotangent; the tap gets instead
        what `add_cotangent` needs to compute it for several reads in one pass.

    Returns:
      The aggregates over these rows, Q times `[B, T, D]` in the type of the sources, and the logs of their softmax
      denominators, float32 `[Q, B, T]`, with which `merge` adds further sources.
    """
    return _read_forward(how, u, sources, inv_rms, count, tap)[0]


def _like(sources: Array, u: tuple[Array, ...]) -> tuple[Array, ...]:
    """Queries in the type of the sources, as the passes over the history take them."""
    return tuple(u_q.astype(sources.dtype) for u_q in u)


def _read_forward(how, u, sources, inv_rms, count, tap):
    result = how.run("forward", _like(sources, u), sources, inv_rms, count)
    has_tap = None if tap is None else ()
    return result, (u, sources, inv_rms, count, has_tap, *result)


def _read_backward(how, residuals, cotangents):
    u, sources, inv_rms, count, has_tap, aggregates, log_sum = residuals
    g, l = cotangents
    arguments = _like(sources, u), sources, inv_rms, count, aggregates, log_sum, g, l
    d_u, l = how.run("query_cotangent", *arguments)
    d_u = tuple(d.astype(u_q.dtype) for d, u_q in zip(d_u, u, strict=True))
    if has_tap is not None:
        return d_u, None, None, None, (g, l)
    d_sources = add_cotangent(how, jnp.zeros_like(sources), u, sources, inv_rms, count, log_sum, g, l)
    return d_u, d_sources, None, None, None


read.defvjp(_read_forward, _read_backward)


def add_cotangent(how, d_sources, u, sources, inv_rms, count, log_sum, g, l) -> Array:
    """Adds the cotangent of the sources of Q tapped reads to `d_sources`, `[K, B, T, D]`, in one pass.

    Args:
      how, sources, inv_rms, count: as in `read`.
      u, log_sum: queries and log sums of the reads, Q times `[B, 1 or T, D]` and `[Q, B, T]`.
      g, l: cotangents of their taps, Q times `[B, T, D]` and `[Q, B, T]`.
    """
    arguments = d_sources, _like(sources, u), sources, inv_rms, count, log_sum, g, l
    return how.run("add_source_cotangent", *arguments)


def merge(u: Array, aggregate: Array, log_sum: Array, recent: list[Array], inv_rms: list[Array]) -> Array:
    """Adds recent sources to an aggregate of the history; the softmax is over all of them.

    Args:
      u: folded query, float32 `[B, 1 or T, D]`.
      aggregate: `[B, T, D]` and its `log_sum` `[B, T]`, from `read`.
      recent: sources `[B, T, D]` of the current step, possibly none.
      inv_rms: their `inverse_rms`, `[B, T]`, of which each source has one for all merges.

    Returns:
      The aggregated state h, `[B, T, D]` float32.
    """
    if u.shape[1] == 1:  # on a CPU a matmul is faster than a sum of products
        dots = [jnp.einsum("bd,btd->bt", u[:, 0], v.astype(u.dtype)) for v in recent]
    else:
        dots = [jnp.sum(u * v, axis=-1) for v in recent]
    scores = [log_sum] + [dot * r for dot, r in zip(dots, inv_rms, strict=True)]
    alpha = jax.nn.softmax(jnp.stack(scores), axis=0)[..., None]
    return sum(a * v for a, v in zip(alpha, [aggregate, *recent], strict=True))
