"""Softmax attention: one function for all models, which never holds the scores of many tokens.

For few keys it is plain XLA on all platforms. For many it is the kernels of attention_tpu.py and attention_gpu.py where
they take the head's size, and elsewhere XLA, by blocks of queries. Then its backward pass is its own: the forward pass
keeps its outputs and the logs of the denominators of the softmax, and no scores.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from dar_jax.models import attention_gpu, attention_short, attention_tpu

# Above so many keys the scores of all queries are never held at once: 24 heads of 4,608 tokens take 2 GB a sample.
MOST_KEYS_AT_ONCE = 2048
# From so many keys on kernels are faster by the planner's estimate: at 1,024 a gradient takes a quarter of plain XLA's.
LEAST_KEYS_OF_KERNELS = 1024
QUERIES_PER_BLOCK = 512
KEPT = "kept"  # the name of what the backward pass needs of the forward pass, for policies of `jax.checkpoint`


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """softmax(q k / sqrt(d)) v for every head, with scores and softmax in float32. Reverse mode only.

    Args:
      q: queries `[B, Q, heads, d]`.
      k, v: keys and values `[B, K, heads, d]`, of the same dtype as `q`.
      key_mask: bool `[B, K]`, true for keys that are read, at least one a sample; None: all are.

    Returns:
      `[B, Q, heads, d]` in the dtype of `v`.
    """
    has_kernel = attention_tpu.supports(q, k) or attention_gpu.supports(q.shape[-1], q.dtype)
    if k.shape[1] < LEAST_KEYS_OF_KERNELS or q.dtype == jnp.float64 or not has_kernel:
        return by_autodiff(q, k, v, key_mask)
    return _by_kernels(q, k, v, key_mask)


def self_attention(
    qkv: Array, heads: int, key_mask: Array | None = None, attend=attention, bias: Array | None = None
) -> Array:
    """Attention of tokens to each other, `[B, T, 3, heads * d]` -> `[B, T, heads * d]`.

    By `attend`, `attention` or `by_autodiff`, with its key mask. Of few tokens `attention` takes kernels that read
    queries, keys and values from one array: on TPUs attention_short.py, on GPUs those of attention_gpu.py.

    `bias`, `[3, heads * d]`, is a summand of qkv whose gradient is asked of this function (`Dense.hands_out_bias`). It
    is the sum of qkv's, which a TPU kernel adds up before they leave the core.
    """
    d = qkv.shape[-1] // heads
    is_short = qkv.shape[1] < LEAST_KEYS_OF_KERNELS
    if attend is attention and is_short and _kernels_of_few_tokens(d, qkv):
        return _of_few_tokens(d, qkv, key_mask, bias)
    if bias is not None:
        qkv = qkv + (bias - jax.lax.stop_gradient(bias))
    return _of_parts(attend, d, qkv, key_mask)


def _kernels_of_few_tokens(d: int, qkv: Array) -> dict:
    """By platform the forward and the backward pass, where they take qkv."""
    found = {}
    if attention_short.supports(qkv, d):
        found["tpu"] = attention_short.forward, attention_short.backward
    if attention_gpu.supports(d, qkv.dtype):
        found["cuda"] = attention_gpu.forward_of_parts, attention_gpu.backward_of_parts
    return found


def _of_parts(attend, d: int, qkv: Array, key_mask: Array | None) -> Array:
    b, tokens, _, size = qkv.shape
    q, k, v = (x.reshape(b, tokens, size // d, d) for x in jnp.split(qkv, 3, axis=2))
    return attend(q, k, v, key_mask).reshape(b, tokens, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_few_tokens(d: int, qkv: Array, key_mask: Array | None, bias: Array | None) -> Array:
    return _of_few_tokens_forward(d, qkv, key_mask, bias)[0]


def _of_few_tokens_forward(d, qkv, key_mask, bias):
    def elsewhere(qkv, key_mask):
        b, tokens, _, size = qkv.shape
        return _of_parts(by_autodiff, d, qkv, key_mask), jnp.zeros((b, size // d, tokens), jnp.float32)

    passes = {name: functools.partial(one, d) for name, (one, _) in _kernels_of_few_tokens(d, qkv).items()}
    out, log_sum = _choose(passes, elsewhere, (qkv, key_mask), (PARTS, SAMPLES), (JOINED, HEADS), qkv.shape[-1] // d)
    has_bias = None if bias is None else ()
    return out, (qkv, key_mask, out, log_sum, has_bias)


def _of_few_tokens_backward(d, residuals, g):
    def elsewhere(qkv, key_mask, out, log_sum, g):
        return jax.vjp(lambda qkv: _of_parts(by_autodiff, d, qkv, key_mask), qkv)[1](g)[0]

    def unsummed(backward):
        return lambda *args: (backward(*args), jnp.zeros(args[0][:, 0].shape, jnp.float32))

    *kept, has_bias = residuals
    passes = {name: functools.partial(one, d) for name, (_, one) in _kernels_of_few_tokens(d, kept[0]).items()}
    passes = {name: one if name == "tpu" else unsummed(one) for name, one in passes.items()}
    axes = PARTS, SAMPLES, JOINED, HEADS, JOINED
    d_qkv, sums = _choose(passes, unsummed(elsewhere), (*kept, g), axes, (PARTS, JOINED), g.shape[-1] // d)
    if has_bias is None:
        return d_qkv, None, None

    def by_autodiff_of_the_sum(d_qkv, sums):
        (d_bias,) = jax.linear_transpose(lambda bias: jnp.broadcast_to(bias, d_qkv.shape), d_qkv[0, 0])(d_qkv)
        return d_bias

    by_kernel = {"tpu": lambda d_qkv, sums: jnp.sum(sums, axis=0).astype(d_qkv.dtype)} if "tpu" in passes else {}
    return d_qkv, None, jax.lax.platform_dependent(d_qkv, sums, **by_kernel, default=by_autodiff_of_the_sum)


_of_few_tokens.defvjp(_of_few_tokens_forward, _of_few_tokens_backward)


def by_autodiff(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """`attention` in plain XLA, which has derivatives of all modes and orders."""
    attend = plain if k.shape[1] <= MOST_KEYS_AT_ONCE else functools.partial(blockwise, size=QUERIES_PER_BLOCK)
    return attend(q, k, v, key_mask)


def plain(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    """`attention` that holds the scores of all queries, `[B, heads, Q, K]`.

    For a CPU heads come first, and what the softmax is multiplied with is divided by its sums, as that is smaller.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v) / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def blockwise(q: Array, k: Array, v: Array, key_mask: Array | None, size: int) -> Array:
    """`attention` over `size` queries at a time, one block after the other; the backward pass computes scores anew."""
    b, num_queries, *head = q.shape
    padded = jnp.pad(q, ((0, 0), (0, -num_queries % size), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, -1, size, *head), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: plain(block, k, v, key_mask), prevent_cse=False), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, *v.shape[2:])[:, :num_queries]


@jax.custom_vjp
def _by_kernels(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    return _by_kernels_forward(q, k, v, key_mask)[0]


def _by_kernels_forward(q, k, v, key_mask):
    kept = _run("forward", (q, k, v, key_mask), (TOKENS, TOKENS, TOKENS, SAMPLES), (TOKENS, HEADS))
    out, log_sum = (checkpoint_name(x, KEPT) for x in kept)
    return out, (q, k, v, key_mask, out, log_sum)


def _by_kernels_backward(residuals, g):
    axes = TOKENS, TOKENS, TOKENS, SAMPLES, TOKENS, HEADS, TOKENS
    return *_run("backward", (*residuals, g), axes, (TOKENS, TOKENS, TOKENS)), None


_by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)

# Axes of what passes take and return, `[B, T, heads, d]`, `[B, heads, T]` and `[B, K]`, as linen's logical names.
TOKENS, HEADS, SAMPLES = ("batch", None, "heads"), ("batch", "heads"), ("batch",)
PARTS, JOINED = ("batch", None, None, "heads"), ("batch", None, "heads")  # [B, T, 3, heads * d], [B, T, heads * d]


def _run(name: str, args: tuple, arg_axes: tuple, result_axes: tuple) -> tuple[Array, ...]:
    """A pass for many keys, "forward" or "backward", by kernels where they take the head's size."""
    q, k = args[:2]
    on_tpu = attention_tpu if attention_tpu.supports(q, k) else _Blockwise
    on_gpu = attention_gpu if attention_gpu.supports(q.shape[-1], q.dtype) else _Blockwise
    passes = {"tpu": getattr(on_tpu, name), "cuda": getattr(on_gpu, name)}
    return _choose(passes, getattr(_Blockwise, name), args, arg_axes, result_axes, q.shape[2])


def _choose(passes: dict, default, args: tuple, arg_axes: tuple, result_axes: tuple, heads: int):
    """The pass of the platform on every device that holds a part of the samples and of the heads.

    The compiler cannot split a kernel by itself. What a mesh axis does not divide is whole on every device.
    """
    choose = functools.partial(jax.lax.platform_dependent, **passes, default=default)
    mesh, split = jax.sharding.get_abstract_mesh(), {None: None}
    if mesh.empty:
        return choose(*args)
    for axis, size in (("batch", len(args[0])), ("heads", heads)):
        (names,) = nn.logical_to_mesh_axes((axis,))
        names = (names,) if isinstance(names, str) else names or ()
        split[axis] = names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
    spec = lambda axes: P(*(split[a] for a in axes))  # noqa: E731
    in_specs = tuple(map(spec, arg_axes))
    out_specs = tuple(map(spec, result_axes)) if isinstance(result_axes[0], tuple) else spec(result_axes)
    return jax.shard_map(choose, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


class _Blockwise:
    """The two passes where there is no kernel. The backward pass needs nothing of the forward pass."""

    @staticmethod
    def forward(q, k, v, key_mask):
        b, num_queries, heads, _ = q.shape
        return by_autodiff(q, k, v, key_mask), jnp.zeros((b, heads, num_queries), jnp.float32)

    @staticmethod
    def backward(q, k, v, key_mask, out, log_sum, g):
        return jax.vjp(lambda *qkv: by_autodiff(*qkv, key_mask), q, k, v)[1](g)
