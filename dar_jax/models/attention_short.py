"""Attention over so few tokens that the scores of a head fit the memory of a TPU's core (Pallas, Mosaic).

A program owns one sample with all of its heads, so each of the arguments crosses HBM once, and scores never do. Heads
lie side by side in `[B, T, heads * d]`, as dense layers write them, and need not be of a multiple of 128 features: a
product takes the whole lanes that hold a head, of which all but the head's are zeros. Scores are keys by queries, so
that maxima and sums go over sublanes. The backward pass needs no more than q, k and v, and computes the scores anew.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dar_jax.models.attention_tpu import LANES, LOG2_E, MASKED, VMEM_LIMIT, dot

SUBLANES = 16  # of a tile in bfloat16
# Seven blocks of a sample in bfloat16, twice because the next ones are fetched meanwhile, and three sums in float32.
MOST_BYTES = 40 * 2**20


def supports(qkv: Array, d: int) -> bool:
    """Whether the kernels take `[B, T, 3, heads * d]` of this shape and dtype: whole tiles of few tokens."""
    _, tokens, _, size = qkv.shape
    held = tokens * size * (14 * qkv.dtype.itemsize + 16) + 16 * tokens**2
    return tokens % SUBLANES == 0 and d % 8 == 0 and held <= MOST_BYTES and qkv.dtype != jnp.float64


def forward(d: int, qkv: Array, key_mask: Array | None, *, interpret: bool = False) -> tuple[Array, Array]:
    """See `attention_gpu.forward_of_parts`, but that the logs of denominators are zeros: `backward` needs none."""
    b, tokens, _, size = qkv.shape
    out_shape = jax.ShapeDtypeStruct((b, tokens, size), qkv.dtype)
    out = _call(_forward, d, 2, _parts_first(qkv), (), key_mask, out_shape, 1, interpret)
    return out, jnp.zeros((b, size // d, tokens), jnp.float32)


def backward(
    d: int, qkv: Array, key_mask: Array | None, out: Array, log_sum: Array, g: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    """See `attention_gpu.backward_of_parts`; also the sums over the tokens, float32 `[B, 3, heads * d]`.

    Reads no outputs.
    """
    parts = _parts_first(qkv)
    b, _, _, size = parts.shape
    out_shape = jax.ShapeDtypeStruct(parts.shape, parts.dtype), jax.ShapeDtypeStruct((b, 3, size), jnp.float32)
    d_qkv, sums = _call(_backward, d, 5, parts, (g,), key_mask, out_shape, 3, interpret)
    return jnp.moveaxis(d_qkv, 1, 2), sums


def _parts_first(qkv: Array) -> Array:
    """`[B, 3, T, D]`, in which order XLA writes qkv to memory by itself."""
    return jnp.moveaxis(qkv, 2, 1)


def _forward(d: int, qkv, bias, out, total):
    total[...] = jnp.zeros_like(total)
    for window, inside in _heads(out.shape, d):
        weights = _weights(jnp.where(inside, qkv[0, :, window], 0), qkv[1, :, window], bias, d)
        found = dot(weights.astype(qkv.dtype), qkv[2, :, window], 0, 0)
        total[0, :, window] += jnp.where(inside, found, 0)
    out[...] = total[0].astype(out.dtype)


def _backward(d: int, qkv, g, bias, d_qkv, sums, total):
    total[...] = jnp.zeros_like(total)
    for window, inside in _heads(g.shape, d):
        # Zeros of these two keep what is added to the gradients of keys and values within the head.
        queries, gradients = jnp.where(inside, qkv[0, :, window], 0), jnp.where(inside, g[:, window], 0)
        keys, values = qkv[1, :, window], qkv[2, :, window]
        weights = _weights(queries, keys, bias, d)
        d_weights = dot(values, gradients, 1, 1)
        along_out = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_scores = (weights * (d_weights - along_out) * d**-0.5).astype(g.dtype)
        total[0, :, window] += jnp.where(inside, dot(d_scores, keys, 0, 0), 0)
        total[1, :, window] += dot(d_scores, queries, 1, 0)
        total[2, :, window] += dot(weights.astype(g.dtype), gradients, 1, 0)
    d_qkv[...] = total[...].astype(d_qkv.dtype)
    for part in range(3):
        sums[part : part + 1] = jnp.sum(total[part], axis=0, keepdims=True)


def _heads(shape: tuple[int, int], d: int):
    """For every head the lanes that hold it, a slice of whole tiles, and which are its own, bool `[1, n]`."""
    size = shape[-1]
    for start in range(0, size, d):
        first, last = start // LANES * LANES, min(-(-(start + d) // LANES) * LANES, size)
        lane = first + jax.lax.broadcasted_iota(jnp.int32, (1, last - first), 1)
        yield slice(first, last), (lane >= start) & (lane < start + d)


def _weights(queries: Array, keys: Array, bias, d: int) -> Array:
    """Softmax over the keys of one head, keys by queries, float32."""
    scores = dot(keys, queries, 1, 1) * (d**-0.5 * LOG2_E)
    scores = scores + bias[0][...] if bias else scores
    weights = jnp.exp2(scores - jnp.max(scores, axis=0, keepdims=True))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def _call(kernel, d: int, matmuls: int, qkv: Array, g: tuple, key_mask: Array | None, out_shape, sums, interpret):
    """Runs a kernel of so many products of all queries with all keys, which adds up so many `[T, heads * d]`."""
    b, _, tokens, size = qkv.shape
    bias = [] if key_mask is None else [jnp.where(key_mask, 0.0, MASKED).astype(jnp.float32)[..., None]]
    whole = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i: (i, *(len(x.shape) - 1) * (0,)))  # noqa: E731
    lanes = sum((-(-(start + d) // LANES) - start // LANES) * LANES for start in range(0, size, d))
    arguments = qkv, *g, bias
    passed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((qkv, *g, out_shape)))
    return pl.pallas_call(
        functools.partial(kernel, d),
        grid=(b,),
        in_specs=jax.tree.map(whole, arguments, is_leaf=lambda x: hasattr(x, "shape")),
        out_specs=jax.tree.map(whole, out_shape),
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((sums, tokens, size), jnp.float32)],
        # Products are of whole lanes.
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * b * tokens**2 * lanes,
            transcendentals=b * tokens**2 * size // d,
            bytes_accessed=passed,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(*arguments)
