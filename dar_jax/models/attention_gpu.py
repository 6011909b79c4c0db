"""Attention that never writes its scores, as kernels for GPUs (Pallas, Triton): both passes of `attention.attention`.

A program owns a block of queries (or, for the gradients of keys and values, of keys) of one head, which it keeps on the
chip, and loops over blocks of the other side. The forward pass is an online softmax. The backward pass computes scores
twice, once for the gradient of queries and once for those of keys and values: no atomic additions, so results repeat.

Heads of any multiple of 8 features up to 128 are loaded as the next power of two, zeros beyond their end. Of tokens
that attend to each other the kernels read queries, keys and values from one array, `[B, T, 3, heads, d]`, and write its
gradient as one.

Not cuDNN's attention (`jax.nn.dot_product_attention`): it looks for cuDNN when it is traced, also for a TPU or a CPU,
and it takes lengths of sequences or a bias for every pair of tokens, but no mask of keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MASKED = -1e30  # finite, so that a block of masked keys alone gives no NaN
LOG2_E = math.log2(math.e)
# Tokens that a program owns, and that it loads at a time. With these no kernel spills registers on sm_90.
OWNED, LOADED = 128, 64


def supports(d: int, dtype) -> bool:
    """Whether the kernels take heads of d features of this dtype."""
    return d % 8 == 0 and d <= 128 and dtype in (jnp.bfloat16, jnp.float16)


def forward(q: Array, k: Array, v: Array, key_mask: Array | None, *, interpret: bool = False) -> tuple[Array, Array]:
    """See `attention_tpu.forward`."""
    out_shape = jax.ShapeDtypeStruct(q.shape, v.dtype), _per_query(q.shape)
    return tuple(_call(_forward, q.shape, k.shape[1], 2, (q, k, v, _masks(key_mask)), out_shape, interpret))


def forward_of_parts(d: int, qkv: Array, key_mask: Array | None, *, interpret: bool = False) -> tuple[Array, Array]:
    """Attention of tokens to each other: qkv `[B, T, 3, heads * d]` -> outputs and logs of denominators.

    Outputs are `[B, T, heads * d]`, logs float32 `[B, heads, T]`.
    """
    b, tokens, _, size = qkv.shape
    parts, owner = qkv.reshape(b, tokens, 3, -1, d), (b, tokens, size // d, d)
    out_shape = jax.ShapeDtypeStruct(owner, qkv.dtype), _per_query(owner)
    out, log_sum = _call(_forward_of_parts, owner, tokens, 2, (parts, _masks(key_mask)), out_shape, interpret)
    return out.reshape(b, tokens, size), log_sum


def backward_of_parts(
    d: int, qkv: Array, key_mask: Array | None, out: Array, log_sum: Array, g: Array, *, interpret: bool = False
) -> Array:
    """The gradient of qkv, in its shape and dtype, from that of the outputs, `[B, T, heads * d]`."""
    b, tokens, _, size = qkv.shape
    owner = b, tokens, size // d, d
    parts, out, g = qkv.reshape(b, tokens, 3, -1, d), out.reshape(owner), g.reshape(owner)
    args = parts, _masks(key_mask), g, log_sum, _along(out, g)
    out_shape = jax.ShapeDtypeStruct(parts.shape, qkv.dtype)
    return _call(_backward_of_parts, owner, tokens, 7, args, out_shape, interpret).reshape(qkv.shape)


class _Part(NamedTuple):
    """Queries, keys or values in an array `[B, T, 3, heads, d]`."""

    ref: object
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        b, tokens, _, *head = self.ref.shape
        return b, tokens, *head

    @property
    def dtype(self):
        return self.ref.dtype


def _parts(ref) -> tuple[_Part, ...]:
    return tuple(_Part(ref, i) for i in range(3))


def _forward_of_parts(qkv, key_mask, out, log_sum):
    _forward(*_parts(qkv), key_mask, out, log_sum)


def _backward_of_parts(qkv, key_mask, g, log_sum, along_out, d_qkv):
    (q, k, v), (d_q, d_k, d_v) = _parts(qkv), _parts(d_qkv)
    _backward_queries(q, k, v, key_mask, g, log_sum, along_out, d_q)
    _backward_keys(q, k, v, key_mask, g, log_sum, along_out, d_k, d_v)


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
    args = q, k, v, _masks(key_mask), g, log_sum, _along(out, g)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    d_q = _call(_backward_queries, q.shape, k.shape[1], 3, args, shape(q), interpret)
    d_k, d_v = _call(_backward_keys, k.shape, q.shape[1], 4, args, (shape(k), shape(v)), interpret)
    return d_q, d_k, d_v


def _along(out: Array, g: Array) -> Array:
    """Of every query the product of its output and the output's gradient, float32 `[B, heads, T]`."""
    return jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=jnp.float32)


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


def _call(kernel, owner: tuple[int, ...], others: int, matmuls: int, args: tuple, out_shape, interpret: bool):
    """Runs a kernel whose programs own blocks of an array of shape `owner`, `[B, T, heads, d]`, and loop over `others`.

    Declares so many products of all queries with all keys, and that every array crosses the memory once.
    """
    b, tokens, heads, d = owner
    pairs = b * heads * tokens * others
    cost = pl.CostEstimate(
        flops=2 * matmuls * pairs * d,
        transcendentals=pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((args, out_shape))),
    )
    return pl.pallas_call(
        kernel,
        grid=(b, heads, pl.cdiv(tokens, OWNED)),
        out_shape=out_shape,
        cost_estimate=cost,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(*args)


def _masks(key_mask: Array | None) -> tuple[Array, ...]:
    return () if key_mask is None else (key_mask.astype(jnp.int8),)


def _per_query(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    b, tokens, heads, _ = shape
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


def _load(x, b, h, first, size: int) -> Array:
    """Tokens from `first` on of a head, `[size, d]`, d a power of two; zeros beyond the last and beyond the head."""
    ref, mask = _head(x, b, h, first, size)
    return triton.load(ref, mask=mask, other=0)


def _store(x, value: Array, b, h, first) -> None:
    ref, mask = _head(x, b, h, first, len(value))
    triton.store(ref, value.astype(x.dtype), mask=mask)


def _head(x, b, h, first, size: int):
    """The tokens from `first` on of a head of a ref or a `_Part`, `[size, d or more]`, and which of them exist."""
    d = x.shape[-1]
    padded = max(16, pl.next_power_of_2(d))  # 16: the least that a product sums over
    rows, exists = pl.ds(first, size), (_places(first, size) < x.shape[1])[:, None]
    lanes = slice(None)
    if padded > d:  # a slice may not reach beyond the head, indices may
        rows, lanes = _places(first, size)[:, None], jnp.arange(padded)[None]
        exists = exists & (lanes < d)
    ref, part = (x.ref, (x.index,)) if isinstance(x, _Part) else (x, ())
    return ref.at[(b, rows, *part, h, lanes)], exists


def _load_row(ref, b, h, first, size: int) -> Array:
    """What belongs to the queries from `first` on, float32 `[size]`; zeros beyond the last."""
    return triton.load(ref.at[b, h, pl.ds(first, size)], mask=_places(first, size) < ref.shape[2], other=0.0)


def _store_row(ref, x: Array, b, h, first) -> None:
    triton.store(ref.at[b, h, pl.ds(first, len(x))], x, mask=_places(first, len(x)) < ref.shape[2])
