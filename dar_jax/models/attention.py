"""Softmax attention: one function for all models, which bounds its memory where there are many tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

# Above so many keys the scores of all queries are never held at once: 24 heads of 4,608 tokens take 2 GB a sample.
MOST_KEYS_AT_ONCE = 2048
QUERIES_PER_BLOCK = 512


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """softmax(q k / sqrt(d)) v for every head, with scores and softmax in float32.

    Args:
      q: queries `[B, Q, heads, d]`.
      k, v: keys and values `[B, K, heads, d]`, of the same dtype as `q`.
      key_mask: bool `[B, K]`, true for keys that are read, at least one a sample; None: all are.

    Returns:
      `[B, Q, heads, d]` in the dtype of `v`.
    """
    attend = plain if k.shape[1] <= MOST_KEYS_AT_ONCE else functools.partial(blockwise, size=QUERIES_PER_BLOCK)
    return attend(q, k, v, key_mask)


def plain(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    """`attention` that holds the scores of all queries, `[B, heads, Q, K]`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = scores * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def blockwise(q: Array, k: Array, v: Array, key_mask: Array | None, size: int) -> Array:
    """`attention` over `size` queries at a time, one block after the other; the backward pass computes scores anew."""
    b, num_queries, *head = q.shape
    padded = jnp.pad(q, ((0, 0), (0, -num_queries % size), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, -1, size, *head), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: plain(block, k, v, key_mask), prevent_cse=False), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, *v.shape[2:])[:, :num_queries]
