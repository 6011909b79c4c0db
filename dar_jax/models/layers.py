"""The parts of a SiT: embedders, attention, MLP, the adaLN-Zero block and the head. Facts as in willisma/SiT."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dar_jax.models import numerics
from dar_jax.models.attention import self_attention
from dar_jax.models.numerics import Arithmetic

logical = nn.with_logical_partitioning
keep_dense_outputs = partial(nn.remat, policy=numerics.keep_dense_outputs, prevent_cse=False)
xavier, normal = nn.initializers.xavier_uniform(), nn.initializers.normal(0.02)
zeros, ones = nn.initializers.zeros, nn.initializers.ones


def constrain(x: Array) -> Array:
    """Shards tokens `[B, T, D]` (or a stack of them) over the mesh by the logical rules."""
    return nn.with_logical_constraint(x, (None,) * (x.ndim - 3) + ("batch", "tokens", "hidden"))


def scan_steps(step: type[nn.Module], length: int, in_axes) -> type[nn.Module]:
    """`step` under `nn.scan`, with parameters `[length, ...]`, and so all that a step shows or is shown."""
    return nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0, "taps": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def layer_norm(x: Array) -> Array:
    """Scale-free LayerNorm over the last axis, eps 1e-6, float32 statistics; keeps shape and dtype.

    Mean and variance come from one pass. What is subtracted before is one of the D features, of which the square of the
    distance to the mean is at most D variances: so E[y^2] - E[y]^2 is exact to D roundings at worst, whatever the mean.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(dtype) - jax.lax.stop_gradient(x[..., :1]).astype(dtype)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(jnp.square(y), axis=-1, keepdims=True) - jnp.square(mean), 0)
    return ((y - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False)
def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
    """layer_norm(x) * (1 + scale) + shift with x `[B, T, D]` and shift, scale `[B, 1, D]`; backward keeps x alone."""
    return layer_norm(x) * (1 + scale) + shift


def modulate_by(adaln: nn.Module, condition: Array) -> Array:
    """adaln(silu(condition)), `[B, D]` -> `[B, 1, n * D]`: shifts, scales and gates.

    Where fsdp splits the large kernel over devices, the few samples of these devices go to the kernel's parts instead
    of the kernel to every device.
    """
    condition = nn.with_logical_constraint(nn.silu(condition), ("group", "embed"))
    return nn.with_logical_constraint(adaln(condition), ("batch", None))[:, None]


def position_table(grid: int, size: int) -> np.ndarray:
    """Fixed 2-D sin-cos table `[grid * grid, size]`, float32; the first half of the features encodes the column."""
    frequencies = 1.0 / 10000 ** (np.arange(size // 4, dtype=np.float64) / (size // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def patchify(x: Array, patch: int) -> Array:
    """`[B, H, W, C]` -> `[B, T, p*p*C]`, tokens row by row, features in order (p, q, c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Array, patch: int, grid: int) -> Array:
    """`[B, T, p*p*C]` -> `[B, H, W, C]`, the inverse of `patchify` for a square of grid * grid tokens."""
    b, c = x.shape[0], x.shape[-1] // patch**2
    x = x.reshape(b, grid, grid, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, grid * patch, grid * patch, c)


class Dense(nn.Module):
    """A linear map of the last axis, `[..., I]` -> `[..., *features]`, with zero bias.

    The kernel `[I, *features]` is initialised as one matrix of prod(features) columns. `axes` are its logical axes; all
    but the first are those of the bias. Where its parameters hold a low-rank adapter (lora.py), it is added.

    With `hands_out_bias` the bias is returned, too. It then gets no gradient through the result, of which that gradient
    is the sum over all tokens: who reads the result has it at hand (`self_attention`).
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    arithmetic: Arithmetic
    kernel_init: nn.initializers.Initializer = xavier
    hands_out_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array | tuple[Array, Array]:
        def init(key, shape, dtype=jnp.float32):
            return self.kernel_init(key, (shape[0], math.prod(shape[1:])), dtype).reshape(shape)

        kernel = self.param("kernel", logical(init, self.axes), (x.shape[-1], *self.features))
        bias = self.param("bias", logical(zeros, self.axes[1:]), self.features)
        dtype, matmul = self.arithmetic.dtype, self.arithmetic.matmul
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
        y = matmul(x, kernel) + (jax.lax.stop_gradient(bias) if self.hands_out_bias else bias)
        if self.has_variable("params", "lora_a"):
            adapter = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
            a, b, scale = nn.dtypes.promote_dtype(*adapter, dtype=dtype)
            y += matmul(scale * matmul(x, a), b)
        y = checkpoint_name(y, numerics.KEPT)
        return (y, bias) if self.hands_out_bias else y


class TimestepEmbedder(nn.Module):
    """Times `[B]` -> `[B, D]`: 256 features [cos, sin] with max period 10000, then a two-layer SiLU MLP.

    `zero_last` zero-initialises the last layer, so that a query of DAR which adds the embedding starts without it.
    """

    size: int
    zero_last: bool
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, t: Array) -> Array:
        frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(128, dtype=jnp.float32) / 128)
        angles = t.astype(jnp.promote_types(t.dtype, jnp.float32))[:, None] * frequencies
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = Dense((self.size,), ("features", "embed"), self.arithmetic, normal, name="dense_0")(x)
        last_init = zeros if self.zero_last else normal
        return Dense((self.size,), ("embed", "condition"), self.arithmetic, last_init, name="dense_1")(nn.silu(x))


class LabelEmbedder(nn.Module):
    """Labels `[B]` in 0..num_classes (the last is the null label of guidance) -> `[B, D]`."""

    num_classes: int
    size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y: Array) -> Array:
        table = self.param("table", logical(normal, ("classes", "embed")), (self.num_classes + 1, self.size))
        return jnp.take(table, y, axis=0).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over `[B, T, D]`; q, k and v come from one matrix of fan-out 3D.

    `key_mask`, bool `[B, T]`, says which tokens are read; None: all.
    """

    num_heads: int
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, x: Array, key_mask: Array | None = None) -> Array:
        size = x.shape[-1]
        # The kernel keeps q, k and v on an axis of their own, so that heads can be split over devices.
        dense = Dense((3, size), ("embed", "qkv", "heads"), self.arithmetic, hands_out_bias=True, name="qkv")
        qkv, bias = dense(x)
        out = self_attention(qkv, self.num_heads, key_mask, self.arithmetic.attention, bias)
        return Dense((size,), ("heads", "embed"), self.arithmetic, name="out")(out)


class Mlp(nn.Module):
    """Linear D -> ratio * D, tanh-GELU, Linear back."""

    ratio: float
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = Dense((int(x.shape[-1] * self.ratio),), ("embed", "mlp"), self.arithmetic, name="dense_0")(x)
        hidden = nn.gelu(hidden, approximate=True)
        return Dense((x.shape[-1],), ("mlp", "embed"), self.arithmetic, name="dense_1")(hidden)


class Block(nn.Module):
    """An adaLN-Zero transformer block as two branches without the residual add: each is one sublayer f_l(h; t)."""

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    arithmetic: Arithmetic

    def setup(self):
        self.adaln = Dense((6 * self.hidden_size,), ("embed", "modulation"), self.arithmetic, zeros)
        self.attention = Attention(self.num_heads, self.arithmetic)
        self.mlp = Mlp(self.mlp_ratio, self.arithmetic)

    @keep_dense_outputs
    def attention_branch(self, x: Array, gate: Array) -> Array:
        return gate * self.attention(x)

    @keep_dense_outputs
    def mlp_branch(self, x: Array, gate: Array) -> Array:
        return gate * self.mlp(x)

    def branches(self, condition: Array):
        """The block's sublayers in order, each with the shift, scale and gate `[B, 1, D]` of `condition` `[B, D]`.

        A branch maps x = modulated_norm(h, shift, scale) and gate to f_l(h; t), `[B, T, D]`.
        """
        modulation = jnp.split(modulate_by(self.adaln, condition), 6, axis=-1)
        return (self.attention_branch, *modulation[:3]), (self.mlp_branch, *modulation[3:])


class Head(nn.Module):
    """A zero-initialised linear map of modulated_norm(h, shift, scale) to `[B, T, features]`."""

    hidden_size: int
    features: int
    arithmetic: Arithmetic

    def setup(self):
        self.adaln = Dense((2 * self.hidden_size,), ("embed", "modulation"), self.arithmetic, zeros)
        self.dense = Dense((self.features,), ("embed", "patch"), self.arithmetic, zeros)

    def modulation(self, condition: Array) -> list[Array]:
        """Shift and scale of SiT, `[B, 1, D]`, from `[B, D]`. In Qwen-Image the first is the scale."""
        return jnp.split(modulate_by(self.adaln, condition), 2, axis=-1)

    def __call__(self, x: Array) -> Array:
        return self.dense(x)
