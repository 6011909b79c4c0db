"""The passes over the history in plain XLA: the readable form, and the one for CPUs. Arguments as in tpu.py.

They go row by row, and take all they need from a row while it is in the cache. A contraction of all rows at once is
copied transposed first (5 times slower for 57 rows on a CPU), and loops that compute the same are not merged by XLA.
"""

import jax
import jax.numpy as jnp
from jax import Array


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _dots_of_row(x: tuple[Array, ...], row: Array) -> Array:
    """x . v: x Q times `[B, 1 or T, D]`, v `[B, T, D]` -> `[Q, B, T]`."""
    dtype = statistics_dtype(row)
    if x[0].shape[1] > 1:
        return jnp.stack([jnp.einsum("btd,btd->bt", x_q, row, preferred_element_type=dtype) for x_q in x])
    queries = jnp.concatenate(x, axis=1)
    return jnp.moveaxis(jnp.einsum("btd,bqd->btq", row, queries, preferred_element_type=dtype), -1, 0)


def _weighted_sum(weights: Array, sources: Array) -> Array:
    """sum_k w_k v_k: `[K, B, T]` and `[K, B, T, D]` -> `[B, T, D]` in float32.

    This is einsum("kbt,kbtd->btd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources (6 times faster on CPU).
    """
    return sum(weights[k][..., None] * sources[k] for k in range(len(sources)))


def forward(u, sources, inv_rms, count):
    """The aggregates and log sums of `routing.read`."""

    def set_row(k, scores):
        return scores.at[k].set(_dots_of_row(u, sources[k]) * inv_rms[k])

    scores = jnp.full((len(sources), len(u), *inv_rms.shape[1:]), -jnp.inf, inv_rms.dtype)
    scores = jax.lax.fori_loop(0, count, set_row, scores).swapaxes(0, 1)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    alpha = jnp.exp(scores - log_sum[:, None])
    return tuple(_weighted_sum(a, sources).astype(sources.dtype) for a in alpha), log_sum


def query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l):
    """The cotangents of u, sum_k s_k r_k v_k, and l - g . aggregate."""
    dtype = l.dtype
    l = l - jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1) for x, y in zip(g, aggregates, strict=True)])

    def weights_of_row(k):  # s_k r_k, [Q, B, T]
        alpha = jnp.exp(_dots_of_row(u, sources[k]) * inv_rms[k] - log_sum)
        return alpha * (_dots_of_row(g, sources[k]) + l) * inv_rms[k]

    if u[0].shape[1] > 1:
        weights = jnp.zeros((len(sources), *l.shape), dtype)
        weights = jax.lax.fori_loop(0, count, lambda k, w: w.at[k].set(weights_of_row(k)), weights)
        return tuple(_weighted_sum(weights[:, q], sources) for q in range(len(u))), l

    def add_row(k, d_u):
        return d_u + jnp.einsum("qbt,btd->bqd", weights_of_row(k), sources[k].astype(dtype))

    d_u = jax.lax.fori_loop(0, count, add_row, jnp.zeros((l.shape[1], len(u), sources.shape[-1]), dtype))
    return tuple(jnp.split(d_u, len(u), axis=1)), l


def add_source_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l):
    """Adds alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of every query to the cotangent of source k."""

    def add_to_row(k, d_sources):
        v, r = sources[k], inv_rms[k]
        scores = _dots_of_row(u, v) * r  # [Q, B, T]
        alpha = jnp.exp(scores - log_sum)
        s = alpha * (_dots_of_row(g, v) + l)
        along_v = jnp.sum(s * scores, axis=0) * jnp.square(r) / v.shape[-1]
        row = d_sources[k] - along_v[..., None] * v
        for q in range(len(u)):
            row += alpha[q][..., None] * g[q] + (s[q] * r)[..., None] * u[q]
        return d_sources.at[k].set(row.astype(sources.dtype))

    return jax.lax.fori_loop(0, count, add_to_row, d_sources)


def _merge(u, values, columns):
    """Scores `[R + 1, B, T]` and weights of the values, (h - mean) / deviation of the merged h, and 1 / deviation."""
    dtype = statistics_dtype(values[0])
    log_sum, *inverse = columns
    dots = [_dots_of_row(u, v.astype(dtype))[0] for v in values[1:]]
    scores = jnp.stack([log_sum] + [dot * r for dot, r in zip(dots, inverse, strict=True)])
    alpha = jax.nn.softmax(scores, axis=0)[..., None]
    h = sum(a * v for a, v in zip(alpha, values, strict=True))
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
    return scores, alpha, centred * inverse_deviation, inverse_deviation


def sublayer_input(u, values, columns, modulation):
    """LayerNorm(h) * (1 + scale) + shift with h the merge of an aggregate and recent sources."""
    normal = _merge(u, values, columns)[2]
    shift, scale = modulation
    return ((normal * (1 + scale) + shift).astype(values[0].dtype),)


def sublayer_input_cotangents(u, values, columns, modulation, g, d_recent):
    """The cotangents of u, of the values, of the log sum and of shift and scale."""
    dtype = statistics_dtype(values[0])
    scores, alpha, normal, inverse_deviation = _merge(u, values, columns)
    g = g[0].astype(dtype)
    g_normal = g * (1 + modulation[1])
    mean = jnp.mean(g_normal, axis=-1, keepdims=True)
    along = jnp.mean(g_normal * normal, axis=-1, keepdims=True)
    g_h = inverse_deviation * (g_normal - mean - along * normal)
    dots = jnp.stack([_dots_of_row((g_h,), v.astype(dtype))[0] for v in values])[..., None]
    d_scores = alpha * (dots - jnp.sum(alpha * dots, axis=0))

    d_values = [alpha[0] * g_h]
    d_u = jnp.zeros((), dtype)
    for k, (v, r, d) in enumerate(zip(values[1:], columns[1:], d_recent, strict=True), start=1):
        r = r[..., None]
        d_score = d_scores[k] * r
        d_values.append(d + alpha[k] * g_h + d_score * u[0] - (d_score * scores[k][..., None] * r / v.shape[-1]) * v)
        d_u += d_score * v if u[0].shape[1] > 1 else jnp.einsum("bt,btd->bd", d_score[..., 0], v.astype(dtype))[:, None]
    d_values = tuple(d.astype(values[0].dtype) for d in d_values)
    d_modulation = jnp.sum(g, axis=1, keepdims=True), jnp.sum(g * normal, axis=1, keepdims=True)
    return (d_u,) if u else (), d_values, (d_scores[0, ..., 0],), d_modulation
