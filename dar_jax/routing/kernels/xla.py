"""The passes over the history in plain XLA: the readable form, and the one for CPUs. Arguments as in tpu.py."""

import jax
import jax.numpy as jnp
from jax import Array


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _dots(x: tuple[Array, ...], sources: Array, count: Array) -> Array:
    """x . v_k for the filled rows, 0 for the others: x Q times `[B, 1 or T, D]` -> `[Q, K, B, T]`.

    Row by row: on a CPU, a contraction of all rows at once copies them transposed first (5 times slower for 57 rows).
    """
    dtype = statistics_dtype(sources)

    def set_row(k, dots):
        if x[0].shape[1] > 1:
            row = jnp.stack([jnp.einsum("btd,btd->bt", x_q, sources[k], preferred_element_type=dtype) for x_q in x])
        else:
            queries = jnp.concatenate(x, axis=1)
            row = jnp.einsum("btd,bqd->btq", sources[k], queries, preferred_element_type=dtype)
            row = jnp.moveaxis(row, -1, 0)
        return dots.at[k].set(row)

    dots = jnp.zeros((len(sources), len(x), *sources.shape[1:3]), dtype)
    return jax.lax.fori_loop(0, count, set_row, dots).swapaxes(0, 1)


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """sum_k w_k v_k: `[K, B, T]` and `[K, B, T, D]` -> `[B, T, D]` in float32.

    This is einsum("kbt,kbtd->btd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources (6 times faster on CPU).
    """
    return sum(weights[k][..., None] * sources[k] for k in range(len(sources)))


def _scores(u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array) -> Array:
    filled = jnp.arange(sources.shape[0]) < count
    return jnp.where(filled[:, None, None], _dots(u, sources, count) * inv_rms, -jnp.inf)


def _cotangent_weights(u, sources, inv_rms, count, log_sum, g, l):
    """The weights alpha, the cotangents of the scores s_k = alpha_k (g . v_k + l), and the scores: `[Q, K, B, T]`."""
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    return alpha, alpha * (_dots(g, sources, count) + l[:, None]), scores


def forward(u, sources, inv_rms, count):
    """The aggregates and log sums of `routing.read`."""
    scores = _scores(u, sources, inv_rms, count)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    alpha = jnp.exp(scores - log_sum[:, None])
    return tuple(_weighted_sum(a, sources).astype(sources.dtype) for a in alpha), log_sum


def query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l):
    """The cotangents of u, sum_k s_k r_k v_k, and l - g . aggregate."""
    dtype = l.dtype
    l = l - jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1) for x, y in zip(g, aggregates, strict=True)])
    _, s, _ = _cotangent_weights(u, sources, inv_rms, count, log_sum, g, l)
    s_r = s * inv_rms
    if u[0].shape[1] > 1:
        return tuple(_weighted_sum(x, sources) for x in s_r), l
    d_u = jnp.einsum("qkbt,kbtd->kbqd", s_r.astype(sources.dtype), sources, preferred_element_type=dtype)
    return tuple(jnp.split(jnp.sum(d_u, axis=0), len(u), axis=1)), l


def add_source_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l):
    """Adds alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of every query to the cotangent of source k."""
    alpha, s, scores = _cotangent_weights(u, sources, inv_rms, count, log_sum, g, l)
    along_v = jnp.sum(jnp.where(alpha > 0, s * scores, 0), axis=0) * jnp.square(inv_rms) / sources.shape[-1]
    s_r = s * inv_rms

    def add_to_row(k, d_sources):
        row = d_sources[k] - along_v[k][..., None] * sources[k]
        for q in range(len(u)):
            row += alpha[q, k][..., None] * g[q] + s_r[q, k][..., None] * u[q]
        return d_sources.at[k].set(row.astype(sources.dtype))

    return jax.lax.fori_loop(0, count, add_to_row, d_sources)
