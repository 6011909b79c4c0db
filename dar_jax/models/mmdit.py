"""MM-DiT, the diffusion transformer of two streams, text and image. Facts as in Qwen-Image.

A pair is always (text, image), the order of the published model's joint attention.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.conditions import PADDING, Condition
from dar_jax.models import layers
from dar_jax.models.layers import Dense, logical, ones
from dar_jax.models.numerics import Arithmetic
from dar_jax.models.sit import Output
from dar_jax.models.text import TextEncoder
from dar_jax.models.two_streams import Stack, stream_kinds
from dar_jax.routing import Layout, Query

# Of the published models: MMDiT(**SIZES["qwen_image"], ...). It has 20,430,401,088 parameters.
SIZES = {"qwen_image": {"depth": 60, "hidden_size": 3072, "num_heads": 24, "text_size": 3584}}


def pack(x: Array, patch: int) -> Array:
    """`[B, H, W, C]` -> `[B, T, C*p*p]`, tokens row by row, features in the order (c, dy, dx)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, -1, c * patch**2)


def unpack(x: Array, patch: int, grid: tuple[int, int]) -> Array:
    """`[B, T, C*p*p]` -> `[B, H, W, C]`, the inverse of `pack` for a grid of rows and columns of tokens."""
    rows, columns = grid
    x = x.reshape(len(x), rows, columns, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(len(x), rows * patch, columns * patch, -1)


def rope_axes(size: int) -> tuple[int, int, int]:
    """How many of the `size` features of a head turn with the frame, the row and the column: of 128, 16, 56 and 56."""
    side = 2 * (7 * size // 32)
    return size - 2 * side, side, side


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which the pairs of features of a stream's q and k turn, each `[T, d / 2]`."""

    cos: np.ndarray
    sin: np.ndarray


def rotations(axes: tuple[int, int, int], grid: tuple[int, int], num_text: int) -> tuple[Rotation, Rotation]:
    """The 3-D rotary embedding of text and image, float64.

    Args:
      axes: features of a head that turn with the frame, the row and the column; pair j of n features turns by
        position * 10000^(-2j / n).
      grid: rows and columns of image tokens. Their positions are centred, -(n - n // 2) to n // 2 - 1; the frame is 0.
      num_text: text tokens. Token i is at position max(n // 2) + i on all three axes.
    """
    rows, columns = grid
    row, column = np.meshgrid(*(np.arange(n) - (n - n // 2) for n in grid), indexing="ij")
    text = max(rows // 2, columns // 2) + np.arange(num_text)

    def rotation(*positions: np.ndarray) -> Rotation:
        angles = [
            position.reshape(-1, 1) * 10000.0 ** (-np.arange(0, size, 2) / size)
            for position, size in zip(positions, axes, strict=True)
        ]
        angles = np.concatenate(angles, axis=1)
        return Rotation(np.cos(angles), np.sin(angles))

    return rotation(text, text, text), rotation(np.zeros_like(row), row, column)


def rotate(x: Array, by: Rotation) -> Array:
    """Turns the neighbouring pairs of features of x, `[B, T, heads, d]`, in float32; keeps shape and dtype."""
    pairs = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = (jnp.asarray(table, pairs.dtype)[:, None] for table in by)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class RmsNorm(nn.Module):
    """x / rms(x) * scale over the last axis, eps 1e-6, float32 statistics; keeps shape and dtype."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", logical(ones, ("norm",)), x.shape[-1:])
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


class Half(nn.Module):
    """What a block holds for one of its streams."""

    hidden_size: int
    num_heads: int
    arithmetic: Arithmetic

    def setup(self):
        size, arithmetic = self.hidden_size, self.arithmetic
        self.adaln = Dense((6 * size,), ("embed", "modulation"), arithmetic, layers.zeros)
        self.q = Dense((size,), ("embed", "heads"), arithmetic)
        self.k = Dense((size,), ("embed", "heads"), arithmetic)
        self.v = Dense((size,), ("embed", "heads"), arithmetic)
        self.q_norm, self.k_norm = RmsNorm(), RmsNorm()
        self.out = Dense((size,), ("heads", "embed"), arithmetic)
        self.mlp = layers.Mlp(4, arithmetic)

    @layers.keep_dense_outputs
    def modulation(self, condition: Array) -> tuple[list[Array], list[Array]]:
        """Shift, scale and gate `[B, 1, D]` of the attention and of the MLP, from `[B, D]`."""
        parts = jnp.split(layers.modulate_by(self.adaln, condition), 6, axis=-1)
        return parts[:3], parts[3:]

    def qkv(self, x: Array, by: Rotation) -> tuple[Array, Array, Array]:
        """Queries, keys and values `[B, T, heads, d]` of `[B, T, D]`."""
        q, k, v = (dense(x).reshape(*x.shape[:2], self.num_heads, -1) for dense in (self.q, self.k, self.v))
        return rotate(self.q_norm(q), by), rotate(self.k_norm(k), by), v


class Block(nn.Module):
    """A double-stream block as two pairs of sublayers without the residual add: joint attention, and an MLP each."""

    hidden_size: int
    num_heads: int
    arithmetic: Arithmetic

    def setup(self):
        self.text = Half(self.hidden_size, self.num_heads, self.arithmetic)
        self.image = Half(self.hidden_size, self.num_heads, self.arithmetic)

    def pairs(self, condition: Array, by: tuple[Rotation, Rotation], key_mask: Array):
        """The pairs in order: a function, and for each stream the shift, scale and gate `[B, 1, D]` of `[B, D]`.

        The function maps what both streams read, modulated_norm(h, shift, scale) `[B, T, D]`, to what both sublayers
        return before the gate, `[B, T, D]`. `key_mask` `[B, L + T]` says which tokens are read.
        """
        attention_modulation, mlp_modulation = zip(
            *(half.modulation(condition) for half in (self.text, self.image)), strict=True
        )
        joint_attention = partial(self.joint_attention, by=by, key_mask=key_mask)
        return (joint_attention, attention_modulation), (self.mlps, mlp_modulation)

    @layers.keep_dense_outputs
    def joint_attention(self, text: Array, image: Array, by, key_mask: Array) -> tuple[Array, Array]:
        parts = zip(self.text.qkv(text, by[0]), self.image.qkv(image, by[1]), strict=True)
        out = self.arithmetic.attention(*(jnp.concatenate(part, axis=1) for part in parts), key_mask)
        out = out.reshape(*out.shape[:2], self.hidden_size)
        num_text = text.shape[1]
        return self.text.out(out[:, :num_text]), self.image.out(out[:, num_text:])

    @layers.keep_dense_outputs
    def mlps(self, text: Array, image: Array) -> tuple[Array, Array]:
        return self.text.mlp(text), self.image.mlp(image)


class MMDiT(nn.Module):
    """Maps x_t `[B, H, W, C]`, t `[B]` in [0, 1] and a text to an `Output`, the velocity x1 - x0.

    The text is {"text": `[B, L, E]`, "mask": bool `[B, L]`}, embeddings of its tokens, and which are no padding; or
    {"words": int32 `[B, L]`}, of which a `TextEncoder` makes embeddings. Padding stands on the right and has no
    influence. Rows and columns of image tokens may be any numbers.

    Qwen-Image counts its time as sigma = 1 - t and predicts x0 - x1; here its output changes sign.

    Each k of `hidden_at`, of 1 to depth - 1, asks for the state that enters the image stream of block k + 1, before its
    norm.

    Attributes:
      input_size: H and W of most samples. The model takes any.
      channels: C.
      patch_size: p; H and W are multiples of it.
      hidden_size: D.
      depth: blocks, of two sublayers in each stream.
      num_heads: attention heads.
      text_length: L of most samples. The model takes any, but of words no more.
      text_size: E.
      num_words, text_depth: of the encoder of words; unused if embeddings come in.
      rope_axes: features of a head that turn with frame, row and column; None: as `rope_axes` says.
      dtype: of activations.
      remat: what the backward pass recomputes of a block: "block", all, or "dense", all but outputs of dense layers.
      layout: structure of the routing; None: residual.
      query: of the aggregators. e(t) is the embedding of the time that modulates both streams.
      streams: which are routed, "image" or "both". The other one stays residual.
      implementation: of aggregations, one of `routing.IMPLEMENTATIONS`.
      plain: whether to compute the same from the same parameters by plain autodiff, which has derivatives of all modes.
    """

    input_size: int
    channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    text_length: int
    text_size: int
    num_words: int
    text_depth: int
    dtype: jnp.dtype
    remat: str
    layout: Layout | None
    query: type[Query]
    streams: str
    implementation: str
    rope_axes: tuple[int, int, int] | None = None
    plain: bool = False

    @nn.compact
    def __call__(self, x_t: Array, t: Array, condition: Condition, *, hidden_at: tuple[int, ...] = ()) -> Output:
        self._check(x_t, condition, hidden_at)
        size, dtype, patch = self.hidden_size, self.dtype, self.patch_size
        arithmetic = Arithmetic.of(dtype, plain=self.plain)
        starts_at_zero = self.layout is not None and self.query.adds_time
        e_t = layers.TimestepEmbedder(size, starts_at_zero, arithmetic, name="timestep")(1000 * (1 - t))

        image = Dense((size,), ("patch", "embed"), arithmetic, name="image")(pack(x_t.astype(dtype), patch))
        text, text_mask = self._text(condition, arithmetic)
        text = RmsNorm(name="text_norm")(text.astype(dtype))
        text = Dense((size,), ("features", "embed"), arithmetic, name="text")(text)
        v_0 = layers.constrain(text), layers.constrain(image)

        grid = x_t.shape[1] // patch, x_t.shape[2] // patch
        by = jax.tree.map(
            jnp.asarray, rotations(self.rope_axes or rope_axes(size // self.num_heads), grid, text.shape[1])
        )
        key_mask = jnp.concatenate([text_mask, jnp.ones(image.shape[:2], bool)], axis=1)

        block = partial(Block, size, self.num_heads, arithmetic)
        kinds = stream_kinds(self.layout, self.query, self.streams)
        stack = Stack(block, self.depth, self.remat, kinds, self.implementation, self.plain, name="stack")
        head = layers.Head(size, patch**2 * self.channels, arithmetic, name="head")
        h, hidden = stack(v_0, e_t, by, key_mask, hidden_at)
        scale, shift = head.modulation(e_t)
        prediction = -unpack(head(layers.modulated_norm(h, shift, scale)), patch, grid)
        return Output(prediction.astype(jnp.promote_types(dtype, jnp.float32)), hidden)

    def _text(self, condition: Condition, arithmetic: Arithmetic) -> tuple[Array, Array]:
        """Embeddings `[B, L, E]` and their mask, bool `[B, L]`."""
        if "words" not in condition:
            return condition["text"], condition["mask"]
        words = condition["words"]
        encoder = TextEncoder(
            self.num_words, self.text_size, self.text_depth, self.num_heads, arithmetic, name="text_encoder"
        )
        return encoder(words), words != PADDING

    def _check(self, x_t: Array, condition: Condition, hidden_at: tuple[int, ...]) -> None:
        if not all(0 < k < self.depth for k in hidden_at):
            raise ValueError(f"hidden_at = {hidden_at} must be in 1 to {self.depth - 1}, the depth less one.")
        if x_t.shape[1] % self.patch_size or x_t.shape[2] % self.patch_size or x_t.shape[3] != self.channels:
            raise ValueError(
                f"x_t has shape {x_t.shape}; it must have {self.channels} channels and sides that are multiples of "
                f"{self.patch_size}."
            )
        if self.rope_axes and sum(self.rope_axes) * self.num_heads != self.hidden_size:
            raise ValueError(f"rope_axes = {self.rope_axes} must add up to {self.hidden_size} / {self.num_heads}.")
        if "text" in condition and condition["text"].shape[-1] != self.text_size:
            raise ValueError(f"the text has {condition['text'].shape[-1]} features, not text_size = {self.text_size}.")
