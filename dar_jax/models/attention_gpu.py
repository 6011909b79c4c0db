"""Attention that never writes its scores, as kernels for GPUs (Pallas, Triton): both passes of `attention.attention`.

A program owns a block of queries (or, for the gradients of keys and values, of keys) of one head, which it keeps on the
chip, and loops over blocks of the other side. The forward pass is an online softmax. The backward pass computes scores
twice, once for the gradient of queries and once for those of keys and values: no atomic additions, so results repeat.

Not cuDNN's attention (`jax.nn.dot_product_attention`): it looks for cuDNN when it is traced, also for a TPU or a CPU,
and it takes lengths of sequences or a bias for every pair of tokens, but no mask of keys.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MASKED = -1e30  # finite, so that a block of masked keys alone gives no NaN
LOG2_E = math.log2(math.e)
# Tokens that a program owns, and that it loads at a time. With these no kernel spills registers on sm_90.
OWNED, LOADED = 128, 64


def supports(q: Array, k: Array) -> bool:
    """Whether the kernels take queries and keys of these shapes, `[B, T, heads, d]`, and dtypes."""
    return q.shape[-1] in (64, 128) and q.dtype in (jnp.bfloat16, jnp.float16)


def forward(q: Array, k: Array, v: Array, key_mask: Array | None, *, interpret: bool = False) -> tuple[Array, Array]:
    """See `attention_tpu.forward`."""
    out_shape = jax.ShapeDtypeStruct(q.shape, v.dtype), _per_query(q)
    call = _call(_forward, q, q, k, out_shape, 2, interpret)
    return tuple(call(q, k, v, _masks(key_mask)))


def _forward(q, k, v, key_mask, out, log_sum):
    b, h, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * OWNED
    queries = _load(q, b, h, first, OWNED)

    def add(j, carry):
        total, maximum, denominator = carry
        scores = _dot(queries, _load(k, b, h, j * LOADED, LOADED).T) * _scale(q)
        scores = jnp.where(_is_read(key_mask, k, b, j * LOADED, LOADED)[None], scores, MASKED)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - new_maximum[:, None]), jnp.exp2(maximum - new_maximum)
        values = _load(v, b, h, j * LOADED, LOADED)
        total = kept[:, None] * total + _dot(weights.astype(values.dtype), values)
        return total, new_maximum, kept * denominator + jnp.sum(weights, axis=1)

    start = jnp.zeros(queries.shape, jnp.float32), jnp.full(OWNED, -jnp.inf), jnp.zeros(OWNED, jnp.float32)
    total, maximum, denominator = jax.lax.fori_loop(0, pl.cdiv(k.shape[1], LOADED), add, start)
    _store(out, total / denominator[:, None], b, h, first)
    _store_row(log_sum, (maximum + jnp.log2(denominator)) / LOG2_E, b, h, first)


def backward(
    q: Array, k: Array, v: Array, key_mask: Array | None, out: Array, log_sum: Array, g: Array, *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """See `attention_tpu.backward`."""
    along_out = jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=jnp.float32)
    args = q, k, v, _masks(key_mask), g, log_sum, along_out
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    d_q = _call(_backward_queries, q, q, k, shape(q), 3, interpret)(*args)
    d_k, d_v = _call(_backward_keys, k, q, k, (shape(k), shape(v)), 4, interpret)(*args)
    return d_q, d_k, d_v


def _backward_queries(q, k, v, key_mask, g, log_sum, along_out, d_q):
    b, h, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * OWNED
    queries, gradients = _load(q, b, h, first, OWNED), _load(g, b, h, first, OWNED)
    log_sums, along = _load_row(log_sum, b, h, first, OWNED) * LOG2_E, _load_row(along_out, b, h, first, OWNED)

    def add(j, total):
        keys, values = (_load(x, b, h, j * LOADED, LOADED) for x in (k, v))
        scores = _dot(queries, keys.T) * _scale(q) - log_sums[:, None]
        scores = jnp.where(_is_read(key_mask, k, b, j * LOADED, LOADED)[None], scores, MASKED)
        d_scores = jnp.exp2(scores) * (_dot(gradients, values.T) - along[:, None])
        return total + _dot(d_scores.astype(keys.dtype), keys)

    total = jax.lax.fori_loop(0, pl.cdiv(k.shape[1], LOADED), add, jnp.zeros(queries.shape, jnp.float32))
    _store(d_q, total * q.shape[-1] ** -0.5, b, h, first)


def _backward_keys(q, k, v, key_mask, g, log_sum, along_out, d_k, d_v):
    b, h, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * OWNED
    keys, values = (_load(x, b, h, first, OWNED) for x in (k, v))
    is_read = _is_read(key_mask, k, b, first, OWNED)

    def add(i, carry):
        total_k, total_v = carry
        queries, gradients = (_load(x, b, h, i * LOADED, LOADED) for x in (q, g))
        log_sums = _load_row(log_sum, b, h, i * LOADED, LOADED) * LOG2_E
        scores = _dot(keys, queries.T) * _scale(q) - log_sums[None]
        weights = jnp.exp2(jnp.where(is_read[:, None], scores, MASKED))
        total_v += _dot(weights.astype(gradients.dtype), gradients)
        d_scores = weights * (_dot(values, gradients.T) - _load_row(along_out, b, h, i * LOADED, LOADED)[None])
        return total_k + _dot(d_scores.astype(queries.dtype), queries), total_v

    zeros = jnp.zeros(keys.shape, jnp.float32)
    # Beyond the last query all that is loaded is 0, and so is what it adds.
    total_k, total_v = jax.lax.fori_loop(0, pl.cdiv(q.shape[1], LOADED), add, (zeros, zeros))
    _store(d_k, total_k * q.shape[-1] ** -0.5, b, h, first)
    _store(d_v, total_v, b, h, first)


def _call(kernel, owner: Array, q: Array, k: Array, out_shape, matmuls: int, interpret: bool):
    """The call of a kernel whose programs own blocks of `owner`, q or k; `matmuls` of all queries with all keys."""
    b, tokens, heads, d = owner.shape
    pairs = b * heads * q.shape[1] * k.shape[1]
    cost = pl.CostEstimate(
        flops=2 * matmuls * pairs * d, transcendentals=pairs, bytes_accessed=4 * (q.size + k.size) * q.dtype.itemsize
    )
    return pl.pallas_call(
        kernel,
        grid=(b, heads, pl.cdiv(tokens, OWNED)),
        out_shape=out_shape,
        cost_estimate=cost,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )


def _masks(key_mask: Array | None) -> tuple[Array, ...]:
    return () if key_mask is None else (key_mask.astype(jnp.int8),)


def _per_query(q: Array) -> jax.ShapeDtypeStruct:
    b, tokens, heads, _ = q.shape
    return jax.ShapeDtypeStruct((b, heads, tokens), jnp.float32)


def _scale(q) -> float:
    """Scores are in units of log 2."""
    return q.shape[-1] ** -0.5 * LOG2_E


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _places(first, size: int) -> Array:
    return first + jnp.arange(size)


def _is_read(key_mask: tuple, k, b, first, size: int) -> Array:
    """Which of the keys from `first` on exist and are read, bool `[size]`."""
    exists = _places(first, size) < k.shape[1]
    if not key_mask:
        return exists
    return triton.load(key_mask[0].at[b, pl.ds(first, size)], mask=exists, other=0) != 0


def _load(ref, b, h, first, size: int) -> Array:
    """Tokens from `first` on of a head, `[size, d]`; zeros beyond the last."""
    exists = (_places(first, size) < ref.shape[1])[:, None]
    return triton.load(ref.at[b, pl.ds(first, size), h, :], mask=exists, other=0)


def _store(ref, x: Array, b, h, first) -> None:
    exists = (_places(first, len(x)) < ref.shape[1])[:, None]
    triton.store(ref.at[b, pl.ds(first, len(x)), h, :], x.astype(ref.dtype), mask=exists)


def _load_row(ref, b, h, first, size: int) -> Array:
    """What belongs to the queries from `first` on, float32 `[size]`; zeros beyond the last."""
    return triton.load(ref.at[b, h, pl.ds(first, size)], mask=_places(first, size) < ref.shape[2], other=0.0)


def _store_row(ref, x: Array, b, h, first) -> None:
    triton.store(ref.at[b, h, pl.ds(first, len(x))], x, mask=_places(first, len(x)) < ref.shape[2])
