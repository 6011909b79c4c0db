"""Softmax over depth: `h = sum_k alpha_k v_k`, `alpha = softmax_k(u . v_k / rms(v_k))` (paper Eq. 5).

`u` is the query with the norm's scale and 1/sqrt(D) folded in (queries.py). The sources of an aggregator come in
two parts: the filled rows of the history buffer, read by `read`, and the recent outputs of the current step, merged
in by `merge`. Statistics, scores and weights are float32; sources may be bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import Array

EPS = 1e-6


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def inverse_rms(v: Array) -> Array:
    """1 / rms over the last axis in float32: `[..., D]` -> `[...]`."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(v.astype(statistics_dtype(v))), axis=-1) + EPS)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=statistics_dtype(b))


def _scores(u: Array, sources: Array, inv_rms: Array, count: Array) -> Array:
    scores = _dot("kbtd,qbtd->qkbt", sources, u.astype(sources.dtype)) * inv_rms
    filled = jnp.arange(sources.shape[0]) < count
    return jnp.where(filled[:, None, None], scores, -jnp.inf)


@jax.custom_vjp
def read(u: Array, sources: Array, inv_rms: Array, count: Array) -> tuple[Array, Array]:
    """Aggregates the first `count` rows of the history for Q queries at once.

    Args:
      u: folded queries, float32 `[Q, B or 1, T or 1, D]` (broadcast over samples and tokens).
      sources: `[K, B, T, D]`; rows from `count` on are ignored, whatever finite values they hold.
      inv_rms: `inverse_rms(sources)`, `[K, B, T]`. No cotangent is returned for it: the one of `sources` already
        accounts for the norm.
      count: filled rows, at least 1, int32 scalar.

    Returns:
      The aggregate over these rows, float32 `[Q, B, T, D]`, and the log of its softmax denominator,
      `[Q, B, T]`, with which `merge` adds further sources.
    """
    return _read_forward(u, sources, inv_rms, count)[0]


def _read_forward(u, sources, inv_rms, count):
    scores = _scores(u, sources, inv_rms, count)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    alpha = jnp.exp(scores - log_sum[:, None])
    aggregate = _dot("qkbt,kbtd->qbtd", alpha, sources)
    return (aggregate, log_sum), (u, sources, inv_rms, count, aggregate, log_sum)


def _read_backward(residuals, cotangents):
    # With g the cotangent of the aggregate h and l that of the log sum, the cotangent of score k is
    # s_k = alpha_k (g . v_k - g . h + l), and that of source k has three directions:
    # alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k, with r_k = 1 / rms(v_k).
    u, sources, inv_rms, count, aggregate, log_sum = residuals
    g, l = cotangents
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    g_dot_v = _dot("qbtd,kbtd->qkbt", g.astype(sources.dtype), sources)
    s = alpha * (g_dot_v + (l - jnp.sum(g * aggregate, axis=-1))[:, None])
    s_r = s * inv_rms
    along_v = jnp.sum(jnp.where(alpha > 0, s_r * inv_rms * scores, 0), axis=0) / sources.shape[-1]
    d_sources = (
        jnp.einsum("qkbt,qbtd->kbtd", alpha, g)
        + jnp.einsum("qkbt,qbtd->kbtd", s_r, jnp.broadcast_to(u, g.shape))
        - along_v[..., None] * sources
    ).astype(sources.dtype)
    d_u = _dot("qkbt,kbtd->qbtd", s_r, sources)
    broadcast = tuple(axis for axis in (1, 2) if u.shape[axis] == 1)
    return jnp.sum(d_u, axis=broadcast, keepdims=True), d_sources, None, None


read.defvjp(_read_forward, _read_backward)


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
