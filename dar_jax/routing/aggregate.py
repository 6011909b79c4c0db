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


def _dot_sources(u: Array, sources: Array) -> Array:
    """u `[Q, B or 1, T or 1, D]` . v_k -> `[Q, K, B, T]`: a matmul where u is one vector for all tokens."""
    dtype = statistics_dtype(sources)
    if u.shape[2] > 1:
        return jnp.einsum("qbtd,kbtd->qkbt", u.astype(sources.dtype), sources, preferred_element_type=dtype)
    k, b, _, d = sources.shape
    u = jnp.broadcast_to(u[:, :, 0].astype(sources.dtype), (len(u), b, d))
    return jnp.einsum("kbtd,kbdq->qkbt", sources, jnp.broadcast_to(u.transpose(1, 2, 0), (k, b, d, len(u))),
                      preferred_element_type=dtype)  # fmt: skip


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """sum_k w_k v_k: `[Q, K, B, T]` and `[K, B, T, D]` -> `[Q, B, T, D]` in float32.

    This is einsum("qkbt,kbtd->qbtd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources (6 times faster on CPU).
    """
    return jnp.stack([sum(w[k][..., None] * sources[k] for k in range(len(sources))) for w in weights])


def _scores(u: Array, sources: Array, inv_rms: Array, count: Array) -> Array:
    filled = jnp.arange(sources.shape[0]) < count
    return jnp.where(filled[:, None, None], _dot_sources(u, sources) * inv_rms, -jnp.inf)


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
    aggregate = _weighted_sum(alpha, sources)
    return (aggregate, log_sum), (u, sources, inv_rms, count, aggregate, log_sum)


def _read_backward(residuals, cotangents):
    # With g the cotangent of the aggregate h and l that of the log sum, the cotangent of score k is
    # s_k = alpha_k (g . v_k - g . h + l), and that of source k has three directions:
    # alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k, with r_k = 1 / rms(v_k).
    u, sources, inv_rms, count, aggregate, log_sum = residuals
    g, l = cotangents
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    s = alpha * (_dot_sources(g, sources) + (l - jnp.sum(g * aggregate, axis=-1))[:, None])
    s_r = s * inv_rms
    along_v = jnp.sum(jnp.where(alpha > 0, s_r * inv_rms * scores, 0), axis=0) / sources.shape[-1]
    along_g_and_u = sum(
        a[..., None] * g_q + b[..., None] * u_q for a, b, g_q, u_q in zip(alpha, s_r, g, u, strict=True)
    )
    d_sources = (along_g_and_u - along_v[..., None] * sources).astype(sources.dtype)
    if u.shape[2] == 1:
        s_r = s_r.astype(sources.dtype)
        d_u = jnp.einsum("qkbt,kbtd->kbqd", s_r, sources, preferred_element_type=statistics_dtype(sources))
        d_u = jnp.sum(d_u, axis=0).swapaxes(0, 1)[:, :, None]  # [Q, B, 1, D]
    else:
        d_u = _weighted_sum(s_r, sources)
    if u.shape[1] == 1:
        d_u = jnp.sum(d_u, axis=1, keepdims=True)
    return d_u, d_sources, None, None


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
