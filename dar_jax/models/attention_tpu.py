"""Attention that never writes its scores, as kernels for TPUs (Pallas, Mosaic): both passes of `attention.attention`.

A program owns a block of queries and a block of keys of one head. Scores are transposed, keys by queries, so that what
belongs to a query is a row, and maxima and sums go over sublanes. The forward pass is an online softmax over the blocks
of keys. The backward pass computes scores once and makes all three gradients of them: those of keys and values add up
over the blocks of queries, and the one of all queries of a head stays in VMEM.

The kernels read `[B, T, heads * d]`, as dense layers write it, so that nothing is transposed in HBM. Products take the
type of the arguments, everything else is float32. Not `pallas.ops.tpu.splash_attention`: it declares no cost, which the
planner needs, and its backward pass cannot be called with what a forward pass has kept.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MASKED = -1e30  # finite, so that a block of masked keys alone gives no NaN
LOG2_E = math.log2(math.e)
# The backward pass holds the gradient of all queries of a head, 1 KB a query in float32 with its bfloat16 result. So
# many fit the 16 MiB of a v4 beside the blocks.
MOST_QUERIES = 8192
VMEM_LIMIT = 64 * 2**20


def block_size(tokens: int) -> int:
    """The block of 512 to 768 tokens that leaves the least of the last block empty, or one block for all."""
    if tokens <= 512:
        return -(-tokens // LANES) * LANES
    return min(range(768, 511, -LANES), key=lambda size: -tokens % size)


def supports(q: Array, k: Array) -> bool:
    """Whether the kernels take queries and keys of these shapes, `[B, T, heads, d]`."""
    return q.shape[-1] % LANES == 0 and q.shape[1] <= MOST_QUERIES


def forward(
    q: Array, k: Array, v: Array, key_mask: Array | None, *, interpret: bool = False
) -> tuple[Array, Array]:  # fmt: skip
    """The outputs `[B, Q, heads, d]` and the logs of the softmax denominators, float32 `[B, heads, Q]`.

    Args:
      q, k, v, key_mask: as in `attention.attention`.
      interpret: run without a TPU, slowly.
    """
    (b, num_queries, heads, d), num_keys = q.shape, k.shape[1]
    of_query, of_key = block_size(num_queries), block_size(num_keys)
    q, k, v = _padded(q, of_query), _padded(k, of_key), _padded(v, of_key)
    bias = _bias(key_mask, b, num_keys, k.shape[1])

    queries = pl.BlockSpec((None, of_query, d), lambda b, h, i, j: (b, i, h))
    keys = pl.BlockSpec((None, of_key, d), lambda b, h, i, j: (b, j, h))
    biases = pl.BlockSpec((None, of_key, 1), lambda b, h, i, j: (b, j, 0))
    row = pl.BlockSpec((None, None, 1, of_query), lambda b, h, i, j: (b, h, 0, i))
    out, log_sum = pl.pallas_call(
        functools.partial(_forward, d**-0.5 * LOG2_E),
        grid=(b, heads, q.shape[1] // of_query, k.shape[1] // of_key),
        in_specs=[queries, keys, keys, [biases] * len(bias)],
        out_specs=[queries, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((b, heads, 1, q.shape[1]), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((d, of_query), (1, of_query), (1, of_query))],
        cost_estimate=_cost(2, q, k, heads, queries=2, keys=2 * q.shape[1] // of_query),
        compiler_params=_params("parallel"),
        interpret=interpret,
    )(q, k, v, bias)
    return out.reshape(b, -1, heads, d)[:, :num_queries], log_sum[:, :, 0, :num_queries]


def _forward(scale, q, k, v, bias, out, log_sum, total, maximum, denominator):
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        denominator[...] = jnp.zeros_like(denominator)
        maximum[...] = jnp.full_like(maximum, -jnp.inf)

    scores = _scores(scale, q, k, bias)
    new_maximum = jnp.maximum(maximum[...], jnp.max(scores, axis=0, keepdims=True))
    weights, kept = jnp.exp2(scores - new_maximum), jnp.exp2(maximum[...] - new_maximum)
    maximum[...] = new_maximum
    denominator[...] = kept * denominator[...] + jnp.sum(weights, axis=0, keepdims=True)
    total[...] = kept * total[...] + dot(v[...], weights.astype(v.dtype), 0, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        out[...] = (total[...] / denominator[...]).T.astype(out.dtype)
        log_sum[...] = (maximum[...] + jnp.log2(denominator[...])) / LOG2_E


def backward(
    q: Array, k: Array, v: Array, key_mask: Array | None, out: Array, log_sum: Array, g: Array, *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradients of q, k and v, in their shapes and dtypes.

    Args:
      q, k, v, key_mask, interpret: as in `forward`.
      out, log_sum: what `forward` returned.
      g: gradient of `out`.
    """
    (b, num_queries, heads, d), num_keys = q.shape, k.shape[1]
    of_query, of_key = block_size(num_queries), block_size(num_keys)
    along_out = jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=jnp.float32)
    q, g, k, v = _padded(q, of_query), _padded(g, of_query), _padded(k, of_key), _padded(v, of_key)
    bias = _bias(key_mask, b, num_keys, k.shape[1])
    log_sum, along_out = (
        jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[1] - num_queries)))[:, :, None] for x in (log_sum, along_out)
    )

    queries = pl.BlockSpec((None, of_query, d), lambda b, h, j, i: (b, i, h))
    all_queries = pl.BlockSpec((None, q.shape[1], d), lambda b, h, j, i: (b, 0, h))
    keys = pl.BlockSpec((None, of_key, d), lambda b, h, j, i: (b, j, h))
    biases = pl.BlockSpec((None, of_key, 1), lambda b, h, j, i: (b, j, 0))
    row = pl.BlockSpec((None, None, 1, of_query), lambda b, h, j, i: (b, h, 0, i))
    gradients = pl.pallas_call(
        functools.partial(_backward, d**-0.5),
        grid=(b, heads, k.shape[1] // of_key, q.shape[1] // of_query),
        in_specs=[queries, keys, keys, [biases] * len(bias), queries, row, row],
        out_specs=[all_queries, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((q.shape[1], d), (of_key, d), (of_key, d))],
        cost_estimate=_cost(5, q, k, heads, queries=1 + 2 * k.shape[1] // of_key, keys=4),
        compiler_params=_params("arbitrary"),
        interpret=interpret,
    )(q, k, v, bias, g, log_sum, along_out)
    lengths = num_queries, num_keys, num_keys
    return tuple(x.reshape(b, -1, heads, d)[:, :n] for x, n in zip(gradients, lengths, strict=True))


def _backward(scale, q, k, v, bias, g, log_sum, along_out, d_q, d_k, d_v, total_q, total_k, total_v):
    j, i = pl.program_id(2), pl.program_id(3)
    rows = pl.ds(i * q.shape[0], q.shape[0])

    @pl.when(i == 0)
    def _():
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    @pl.when(j == 0)
    def _():
        total_q[rows, :] = jnp.zeros(q.shape, jnp.float32)

    weights = jnp.exp2(_scores(scale * LOG2_E, q, k, bias) - log_sum[...] * LOG2_E)
    total_v[...] += dot(weights.astype(g.dtype), g[...], 1, 0)
    d_scores = (weights * (dot(v[...], g[...], 1, 1) - along_out[...])).astype(q.dtype)
    total_k[...] += dot(d_scores, q[...], 1, 0)
    total_q[rows, :] += dot(d_scores, k[...], 0, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
        d_v[...] = total_v[...].astype(d_v.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        d_q[rows, :] = (total_q[rows, :] * scale).astype(d_q.dtype)


def _scores(scale: float, q, k, bias) -> Array:
    """Scores in units of log 2, keys by queries."""
    scores = dot(k[...], q[...], 1, 1) * scale
    return scores + bias[0][...] if bias else scores


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of two matrices over these axes, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _padded(x: Array, block: int) -> Array:
    """`[B, T, heads, d]` -> `[B, T', heads * d]`, with zeros up to whole blocks."""
    b, tokens = x.shape[:2]
    return jnp.pad(x.reshape(b, tokens, -1), ((0, 0), (0, -tokens % block), (0, 0)))


def _bias(key_mask: Array | None, b: int, num_keys: int, padded: int) -> list[Array]:
    """What is added to scores, `[B, T', 1]`: 0, or `MASKED` for keys that are not read. None if all are."""
    if key_mask is None and padded == num_keys:
        return []
    key_mask = jnp.ones((b, num_keys), bool) if key_mask is None else key_mask
    bias = jnp.where(key_mask, 0.0, MASKED).astype(jnp.float32)
    return [jnp.pad(bias, ((0, 0), (0, padded - num_keys)), constant_values=MASKED)[..., None]]


def _params(queries: str) -> pltpu.CompilerParams:
    semantics = "parallel", "parallel", queries, "arbitrary"
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _cost(matmuls: int, q: Array, k: Array, heads: int, *, queries: int, keys: int) -> pl.CostEstimate:
    """Of so many products of all queries with all keys, where q and k pass through HBM so many times."""
    b, num_queries, size = q.shape
    pairs = b * num_queries * k.shape[1]
    return pl.CostEstimate(
        flops=2 * matmuls * pairs * size,
        transcendentals=pairs * heads,
        bytes_accessed=(queries * q.size + keys * k.size) * q.dtype.itemsize,
    )
