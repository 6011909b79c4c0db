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
        """xla(*args) or kernel(*args). The samples are axis 1 of every argument but the count."""
        if self.implementation == "xla" or args[0].dtype == jnp.float64:
            return xla(*args)
        kernel = functools.partial(kernel, mean_count=self.mean_count)
        on_cpu = xla if self.implementation == "auto" else functools.partial(kernel, interpret=True)

        def shard(*args):
            return jax.lax.platform_dependent(*args, tpu=kernel, default=on_cpu)

        if not self.batch_axes:
            return shard(*args)
        shards = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in self.batch_axes)
        spec = PartitionSpec(None, None if args[0].shape[1] % shards else self.batch_axes)
        specs = tuple(spec if jnp.ndim(x) else PartitionSpec() for x in args)
        return jax.shard_map(shard, in_specs=specs, out_specs=spec, check_vma=False)(*args)


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def inverse_rms(v: Array) -> Array:
    """1 / rms over the last axis in float32: `[..., D]` -> `[...]`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(v.astype(statistics_dtype(v))), axis=-1) + EPS)


def _dot_sources(u: Array, sources: Array) -> Array:
    """u `[Q, B, 1 or T, D]` . v_k -> `[Q, K, B, T]`: a matmul where u is one vector for all tokens of a sample."""
    dtype = statistics_dtype(sources)
    if u.shape[2] > 1:
        return jnp.einsum("qbtd,kbtd->qkbt", u, sources, preferred_element_type=dtype)
    k, b, _, d = sources.shape
    u = jnp.broadcast_to(u[:, :, 0].transpose(1, 2, 0), (k, b, d, len(u)))
    return jnp.einsum("kbtd,kbdq->qkbt", sources, u, preferred_element_type=dtype)


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """sum_k w_k v_k: `[Q, K, B, T]` and `[K, B, T, D]` -> `[Q, B, T, D]` in float32.

    This is einsum("qkbt,kbtd->qbtd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources (6 times faster on CPU).
    """
    return jnp.stack([sum(w[k][..., None] * sources[k] for k in range(len(sources))) for w in weights])


def _scores(u: Array, sources: Array, inv_rms: Array, count: Array) -> Array:
    filled = jnp.arange(sources.shape[0]) < count
    return jnp.where(filled[:, None, None], _dot_sources(u, sources) * inv_rms, -jnp.inf)


def _forward(u: Array, sources: Array, inv_rms: Array, count: Array) -> tuple[Array, Array]:
    """The aggregates, in the type of the sources, and log sums of `read`."""
    scores = _scores(u, sources, inv_rms, count)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    alpha = jnp.exp(scores - log_sum[:, None])
    return _weighted_sum(alpha, sources).astype(sources.dtype), log_sum


def _weights(u, sources, inv_rms, count, log_sum, g, l):
    """alpha and s, the cotangent of the scores, s_k = alpha_k (g . v_k + l): `[Q, K, B, T]`; and the scores."""
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    return alpha, alpha * (_dot_sources(g, sources) + l[:, None]), scores


def _query_cotangent(u, sources, inv_rms, count, log_sum, g, l) -> Array:
    """sum_k s_k r_k v_k, with r_k = 1 / rms(v_k): the cotangent of u, float32. Arguments as in kernels.py."""
    _, s, _ = _weights(u, sources, inv_rms, count, log_sum, g, l)
    if u.shape[2] > 1:
        return _weighted_sum(s * inv_rms, sources)
    s_r = (s * inv_rms).astype(sources.dtype)
    d_u = jnp.einsum("qkbt,kbtd->kbqd", s_r, sources, preferred_element_type=statistics_dtype(sources))
    return jnp.sum(d_u, axis=0).swapaxes(0, 1)[:, :, None]


def _add_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l) -> Array:
    """Adds alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of every query to the cotangent of source k."""
    alpha, s, scores = _weights(u, sources, inv_rms, count, log_sum, g, l)
    s_r = s * inv_rms
    along_v = jnp.sum(jnp.where(alpha > 0, s_r * inv_rms * scores, 0), axis=0) / sources.shape[-1]
    along_g_and_u = sum(
        a[..., None] * g_q + b[..., None] * u_q for a, b, g_q, u_q in zip(alpha, s_r, g, u, strict=True)
    )
    return (d_sources + along_g_and_u - along_v[..., None] * sources).astype(sources.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(
    how: Execution, u: Array, sources: Array, inv_rms: Array, count: Array, tap: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Aggregates the first `count` rows of the history for Q queries at once.

    Args:
      how: implementation.
      u: folded queries, `[Q, B, 1 or T, D]`.
      sources: `[K, B, T, D]`; rows from `count` on are ignored, whatever finite values they hold.
      inv_rms: `inverse_rms(sources)`, `[K, B, T]`. No cotangent is returned for it: the one of `sources` already
        accounts for the norm.
      count: filled rows, at least 1, int32 scalar.
      tap: None, or zeros in the shape of the result. With a tap the sources get no cotangent; the tap gets instead
        what `add_cotangent` needs to compute it for several reads in one pass.

    Returns:
      The aggregate over these rows, `[Q, B, T, D]` in the type of the sources, and the log of its softmax
      denominator, float32 `[Q, B, T]`, with which `merge` adds further sources.
    """
    return _read_forward(how, u, sources, inv_rms, count, tap)[0]


def _read_forward(how, u, sources, inv_rms, count, tap):
    aggregate, log_sum = how.run(_forward, kernels.forward, u.astype(sources.dtype), sources, inv_rms, count)
    return (aggregate, log_sum), (u, sources, inv_rms, count, tap, aggregate, log_sum)


def _read_backward(how, residuals, cotangents):
    u, sources, inv_rms, count, tap, aggregate, log_sum = residuals
    g, l = cotangents
    l = l - jnp.sum(g.astype(l.dtype) * aggregate.astype(l.dtype), axis=-1)
    arguments = u.astype(sources.dtype), sources, inv_rms, count, log_sum, g, l
    d_u = how.run(_query_cotangent, kernels.query_cotangent, *arguments).astype(u.dtype)
    if tap is not None:
        return d_u, None, None, None, (g, l)
    return d_u, add_cotangent(how, jnp.zeros_like(sources), *arguments), None, None, None


read.defvjp(_read_forward, _read_backward)


def add_cotangent(how, d_sources, u, sources, inv_rms, count, log_sum, g, l) -> Array:
    """Adds the cotangent of the sources of Q tapped reads to `d_sources`, `[K, B, T, D]`, in one pass.

    Args:
      how, sources, inv_rms, count: as in `read`.
      u, log_sum: queries and log sums of the reads, `[Q, B, 1 or T, D]` and `[Q, B, T]`.
      g, l: cotangents of their taps, `[Q, B, T, D]` and `[Q, B, T]`.
    """
    arguments = d_sources, u.astype(sources.dtype), sources, inv_rms, count, log_sum, g, l
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
