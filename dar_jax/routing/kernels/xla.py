"""The passes over the history in plain XLA: the readable form, and the one for CPUs. Arguments as in tpu.py.

What makes them fast on a CPU: products with the sources are taken outside of loops, and query by query where queries
differ between tokens, so that XLA computes once what several passes need (it merges no loops). No product has the
sources transposed, which copies them, and none is a plain sum over the last axis, which is not vectorised.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

EPS = 1e-6  # of RMSNorm and LayerNorm


def statistics_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for a float64 array: the type of norms, scores and softmax weights."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _of_filled(function, sources: Array, count: Array):
    """`function(sources[:n])` for the least of up to 4 sizes n >= `count`: what it returns must not depend on n."""
    sizes = sorted({-(-len(sources) * i // 4) for i in range(1, 5)})
    return jax.lax.switch(sum(count > n for n in sizes[:-1]), [lambda n=n: function(sources[:n]) for n in sizes])


def _dots(x: tuple[Array, ...], sources: Array, count: Array) -> Array:
    """x . v: x Q times `[B, 1 or T, D]`, v `[K, B, T, D]` -> `[Q, K, B, T]`; rows from `count` on mean nothing."""
    dtype, (k, _, _, d) = statistics_dtype(sources), sources.shape
    if x[0].shape[1] == 1:
        queries = jnp.concatenate(x, axis=1)

        def dots_of_shared(v):
            # A matmul for each row and sample. With q first in the result, all sources would be copied.
            of_rows = jnp.broadcast_to(queries, (len(v), *queries.shape))
            found = jnp.einsum("kbtd,kbqd->kbtq", v, of_rows, preferred_element_type=dtype)
            return jnp.pad(jnp.moveaxis(found, -1, 0), ((0, 0), (0, k - len(v)), (0, 0), (0, 0)))

        return _of_filled(dots_of_shared, sources, count)

    lanes = math.gcd(d, 16)

    def on_cpu(x_q, v):
        slices = [slice(i, i + lanes) for i in range(0, d, lanes)]
        return sum(x_q[..., i].astype(dtype) * v[..., i].astype(dtype) for i in slices) @ jnp.ones(lanes, dtype)

    def elsewhere(x_q, v):
        return jnp.sum(x_q.astype(dtype) * v.astype(dtype), axis=-1)

    def dots_of(x_q):
        def dots(v):
            found = jax.lax.platform_dependent(x_q, v, cpu=on_cpu, default=elsewhere)
            return jnp.pad(found, ((0, k - len(v)), (0, 0), (0, 0)))

        return _of_filled(dots, sources, count)

    return jnp.stack([dots_of(x_q) for x_q in x])


def _scores(u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array) -> Array:
    """`[Q, K, B, T]`; of rows from `count` on so low that their weight is 0, but finite: 0 * score is 0."""
    filled = jnp.arange(len(sources)) < count
    return jnp.where(filled[:, None, None], _dots(u, sources, count) * inv_rms, -1e30)


def _weighted_sums(weights: Array, sources: Array, count: Array) -> tuple[Array, ...]:
    """sum_k w_k v_k: `[Q, K, B, T]` and `[K, B, T, D]` -> Q times `[B, T, D]` in float32.

    This is einsum("qkbt,kbtd->qbtd"), written term by term: as a dot it is a batch of B * T tiny matmuls, here one
    fused pass over the sources for each query (6 times faster on CPU).
    """

    def sums(v):
        return tuple(sum(w[k][..., None] * v[k] for k in range(len(v))) for w in weights)

    return _of_filled(sums, sources, count)


def forward(u, sources, inv_rms, count):
    """The aggregates and log sums of `routing.read`."""
    scores = _scores(u, sources, inv_rms, count)
    log_sum = jax.nn.logsumexp(scores, axis=1)
    aggregates = _weighted_sums(jnp.exp(scores - log_sum[:, None]), sources, count)
    return tuple(x.astype(sources.dtype) for x in aggregates), log_sum


def query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l):
    """The cotangents of u, sum_k s_k r_k v_k, and l - g . aggregate."""
    dtype = l.dtype
    l = l - jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1) for x, y in zip(g, aggregates, strict=True)])
    alpha = jnp.exp(_scores(u, sources, inv_rms, count) - log_sum[:, None])
    s_r = alpha * (_dots(g, sources, count) + l[:, None]) * inv_rms
    if u[0].shape[1] > 1:
        return tuple(x.astype(u[0].dtype) for x in _weighted_sums(s_r, sources, count)), l
    d_u = jnp.sum(jnp.einsum("qkbt,kbtd->kbqd", s_r, sources.astype(dtype)), axis=0)
    return tuple(jnp.split(d_u, len(u), axis=1)), l


def add_source_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l):
    """Adds alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of every query to the cotangent of source k.

    Without `d_sources` (None) the sum of these is the cotangent, and zero in rows from `count` on.
    """
    scores = _scores(u, sources, inv_rms, count)
    alpha = jnp.exp(scores - log_sum[:, None])
    s_r = alpha * (_dots(g, sources, count) + l[:, None]) * inv_rms
    along_v = sum(s_r * scores) * inv_rms / sources.shape[-1]  # jnp.sum would draw all that follows into its own fusion

    def of_rows(k):
        parts = [a[k][..., None] * g_q + b[k][..., None] * u_q for a, g_q, b, u_q in zip(alpha, g, s_r, u, strict=True)]
        return sum(parts, -along_v[k][..., None] * sources[k])

    if d_sources is None:
        return of_rows(slice(None)).astype(sources.dtype)

    def add_to_row(k, d_sources):
        # The branch is always taken. It keeps the sum, for all threads, out of the update in place, which has but one.
        new = lambda: (d_sources[k] + of_rows(k)).astype(sources.dtype)  # noqa: E731
        return d_sources.at[k].set(jax.lax.cond(k < count, new, lambda: d_sources[k]))

    return jax.lax.fori_loop(0, count, add_to_row, d_sources)


def cotangents(d_sources, u, sources, inv_rms, count, aggregates, log_sum, g, l):
    """Both of the above, for queries that all tokens of a sample share."""
    d_u, l = query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l)
    return add_source_cotangent(d_sources, u, sources, inv_rms, count, log_sum, g, l), d_u


def _dot(x: Array, v: Array) -> Array:
    """`[B, 1 or T, D]` and `[B, T, D]` -> `[B, T]`."""
    dtype = statistics_dtype(v)
    if x.shape[1] < v.shape[1]:
        return jnp.einsum("bd,btd->bt", x[:, 0], v, preferred_element_type=dtype)
    return jnp.einsum("btd,btd->bt", x, v, preferred_element_type=dtype)


def _merge(u, values, columns):
    """Scores `[R + 1, B, T]` and weights of the values, (h - mean) / deviation of the merged h, and 1 / deviation."""
    log_sum, *inverse = columns
    dots = [_dot(u[0], v) for v in values[1:]]
    scores = jnp.stack([log_sum] + [dot * r for dot, r in zip(dots, inverse, strict=True)])
    alpha = jax.nn.softmax(scores, axis=0)[..., None]
    h = sum(a * v for a, v in zip(alpha, values, strict=True))
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS)
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
    dots = jnp.stack([_dot(g_h, v) for v in values])[..., None]
    d_scores = alpha * (dots - jnp.sum(alpha * dots, axis=0))

    def add_up(_, d, alpha, along_u, along_v, v):
        return d + alpha * g_h + along_u * u[0] - along_v * v

    def in_branch(always, *args):
        """Keeps XLA on a CPU from drawing this sum into those of all sublayers before this one."""
        return jax.lax.cond(always, add_up, lambda _, d, *__: d.astype(dtype), always, *args)

    always = ~(inverse_deviation[0, 0, 0] < 0)
    d_values = [alpha[0] * g_h]
    d_u = jnp.zeros((), dtype)
    for k, (v, r, d) in enumerate(zip(values[1:], columns[1:], d_recent, strict=True), start=1):
        r = r[..., None]
        d_score = d_scores[k] * r
        parts = d, alpha[k], d_score, d_score * scores[k][..., None] * r / v.shape[-1], v
        d_values.append(jax.lax.platform_dependent(always, *parts, cpu=in_branch, default=add_up))
        d_u += d_score * v if u[0].shape[1] > 1 else jnp.einsum("bt,btd->bd", d_score[..., 0], v.astype(dtype))[:, None]
    d_values = tuple(d.astype(values[0].dtype) for d in d_values)
    d_u = d_u.astype(u[0].dtype) if u and u[0].shape[1] > 1 else d_u
    d_modulation = jnp.sum(g, axis=1, keepdims=True), jnp.sum(g * normal, axis=1, keepdims=True)
    return (d_u,) if u else (), d_values, (d_scores[0, ..., 0],), d_modulation
