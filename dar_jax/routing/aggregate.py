"""Softmax over depth: `h = sum_k alpha_k v_k`, `alpha = softmax_k(u . v_k / rms(v_k))` (paper Eq. 5).

`u` is the query with the norm's scale and 1/sqrt(D) folded in (queries.py). The sources of an aggregator come in
two parts: the filled rows of the history buffer, read by `read`, and the recent outputs of the current step, merged
in by `merge`. Statistics, scores and weights are float32; sources may be bfloat16.

The same three functions exist for XLA (here) and as fused kernels (kernels.py): the forward pass, the cotangent of the
query, and the cotangent of the sources, which is added for all reads of a step at once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from dar_jax.routing import kernels

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Execution:
    """How aggregations run; it does not change what they compute.

    Attributes:
      implementation: "xla", "pallas" (on a CPU interpreted, for tests), or "auto": kernels where the platform has them.
      batch_axes: mesh axes over which the samples are split: the compiler cannot split a kernel by itself. A batch
        that they do not divide (of a single sample, at initialisation) runs whole on every device.
      mean_count: mean of `count` over all reads; only the declared cost of kernels depends on it. None: all rows.
    """

    implementation: str = "auto"
    batch_axes: tuple[str, ...] = ()
    mean_count: float | None = None

    def run(self, xla, kernel, *args):
        """xla(*args) or kernel(*args). The samples are axis 0 of arrays in tuples and axis 1 of other arrays."""
        if self.implementation == "xla" or jax.tree.leaves(args)[0].dtype == jnp.float64:
            return xla(*args)
        kernel = functools.partial(kernel, mean_count=self.mean_count)
        on_cpu = xla if self.implementation == "auto" else functools.partial(kernel, interpret=True)

        def choose(*args):
            return jax.lax.platform_dependent(*args, tpu=kernel, default=on_cpu)

        shards = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in self.batch_axes)
        if shards == 1:
            return choose(*args)
        batch_size = next(x[0].shape[0] for x in args if isinstance(x, tuple))
        axes = None if batch_size % shards else self.batch_axes
        tokens, rows, scalar = PartitionSpec(axes), PartitionSpec(None, axes), PartitionSpec()
        specs = tuple(tokens if isinstance(x, tuple) else rows if x.ndim else scalar for x in args)
        out_specs = rows if xla is _add_cotangent else (tokens, rows)
        return jax.shard_map(choose, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def inverse_rms(v: Array) -> Array:
    """1 / rms over the last axis in float32: `[..., D]` -> `[...]`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(v.astype(statistics_dtype(v))), axis=-1) + EPS)


def _dots(x: tuple[Array, ...], sources: Array) -> Array:
    """x . v_k: x Q times `[B, 1 or T, D]` -> `[Q, K, B, T]`; a matmul where x is one vector for all tokens."""
    dtype = statistics_dtype(sources)
    if x[0].shape[1] > 1:
        return jnp.einsum("qbtd,kbtd->qkbt", jnp.stack(x), sources, preferred_element_type=dtype)
    k, b, _, d = sources.shape
    x = jnp.broadcast_to(jnp.concatenate(x, axis=1).swapaxes(1, 2), (k, b, d, len(x)))
    return jnp.einsum("kbtd,kbdq->qkbt", sources, x, preferred_element_type=dtype)


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """sum_k w_k v_k: `[K, B, T]` and `[K, B, T, D]` -> `[B, T, D]` in float32.

    This is einsum("kbt,kbtd->btd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources (6 times faster on CPU).
    """
    return sum(weights[k][..., None] * sources[k] for k in range(len(sources)))


def _scores(u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array) -> Array:
    filled = jnp.arange(sources.shape[0]) < count
    return jnp.where(filled[:, None, None], _dots(u, sources) * inv_rms, -jnp.inf)


def _forward(u, sources, inv_rms, count):
    """What kernels.forward computes, for XLA. So are the next two."""
    scores = _scores(u, sources, inv_rms, count)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    alpha = jnp.exp(scores - log_sum[:, None])
    return tuple(_weighted_sum(a, sources).astype(sources.dtype) for a in alpha), log_sum


def _query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l):
    dtype = l.dtype
    l = l - jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1) for x, y in zip(g, aggregates, strict=True)])
    alpha = jnp.exp(_scores(u, sources, inv_rms, count) - log_sum[:, None])
    s_r = alpha * (_dots(g, sources) + l[:, None]) * inv_rms
    if u[0].shape[1] > 1:
        return tuple(_weighted_sum(x, sources) for x in s_r), l
    d_u = jnp.einsum("qkbt,kbtd->kbqd", s_r.astype(sources.dtype), sources, preferred_element_type=dtype)
    return tuple(jnp.split(jnp.sum(d_u, axis=0), len(u), axis=1)), l


def _add_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l):
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    s = alpha * (_dots(g, sources) + l[:, None])
    along_v = jnp.sum(jnp.where(alpha > 0, s * scores, 0), axis=0) * jnp.square(inv_rms) / sources.shape[-1]
    along_g_and_u = sum(
        a[..., None] * g_q + b[..., None] * u_q for a, b, g_q, u_q in zip(alpha, s * inv_rms, g, u, strict=True)
    )
    return (d_sources + along_g_and_u - along_v[..., None] * sources).astype(sources.dtype)


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


def _read_forward(how, u, sources, inv_rms, count, tap):
    narrow = tuple(u_q.astype(sources.dtype) for u_q in u)
    result = how.run(_forward, kernels.forward, narrow, sources, inv_rms, count)
    return result, (u, sources, inv_rms, count, tap, *result)


def _read_backward(how, residuals, cotangents):
    u, sources, inv_rms, count, tap, aggregates, log_sum = residuals
    g, l = cotangents
    narrow = tuple(u_q.astype(sources.dtype) for u_q in u)
    arguments = narrow, sources, inv_rms, count, aggregates, log_sum, g, l
    d_u, l = how.run(_query_cotangent, kernels.query_cotangent, *arguments)
    d_u = tuple(d.astype(u_q.dtype) for d, u_q in zip(d_u, u, strict=True))
    if tap is not None:
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
    narrow = tuple(u_q.astype(sources.dtype) for u_q in u)
    arguments = d_sources, narrow, sources, inv_rms, count, log_sum, g, l
    return how.run(_add_cotangent, kernels.add_cotangent, *arguments)


def merge(u: Array, aggregate: Array, log_sum: Array, recent: list[Array]) -> Array:
    """Adds recent sources to an aggregate of the history; the softmax is over all of them.

    Args:
      u: folded query, float32, broadcastable to `[B, T, D]`.
      aggregate: `[B, T, D]` float32 and its `log_sum` `[B, T]`, from `read`.
      recent: sources `[B, T, D]` of the current step, possibly none.

    Returns:
      The aggregated state h, `[B, T, D]` float32.
    """
    scores = [log_sum] + [jnp.sum(u * v, axis=-1) * inverse_rms(v) for v in recent]
    alpha = jax.nn.softmax(jnp.stack(scores), axis=0)[..., None]
    return sum(a * v for a, v in zip(alpha, [aggregate, *recent], strict=True))
