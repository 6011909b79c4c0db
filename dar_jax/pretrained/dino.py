"""Frozen image encoders: DINOv2 (Oquab et al. 2023, arXiv:2304.07193) and DINOv3 (Simeoni et al. 2025,
arXiv:2508.10104), vision transformers whose patch tokens are the targets of REPA (Yu et al. 2024, arXiv:2410.06940).

The class token and the registers go before the patches; both read the image and are thrown away. DINOv2 adds a table of
positions, learned on a grid of its own and resampled to the image's. DINOv3 rotates queries and keys instead.
`dino_weights` reads the published weights.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.models.layers import Dense, logical, normal, patchify, scan_steps
from dar_jax.models.numerics import Arithmetic, plain_matmul

MLP_RATIO = 4
EPSILON = {2: 1e-6, 3: 1e-5}  # of LayerNorm, by version
ROPE_BASE = 100.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]

_S, _B, _L = (
    {"hidden_size": size, "depth": depth, "num_heads": size // 64} for size, depth in ((384, 12), (768, 12), (1024, 24))
)
_V2 = {"version": 2, "patch_size": 14, "table_size": 37}
_V3 = {"version": 3, "patch_size": 16, "table_size": 0, "num_registers": 4}
# The fields of `Dino` by the published sizes.
SIZES = {
    **{f"dinov2_{name}": {**_V2, **size, "num_registers": 0} for name, size in (("s", _S), ("b", _B), ("l", _L))},
    **{f"dinov2_{name}_reg": {**_V2, **size, "num_registers": 4} for name, size in (("s", _S), ("b", _B), ("l", _L))},
    **{f"dinov3_{name}": {**_V3, **size} for name, size in (("s", _S), ("b", _B))},
}


class Dino(nn.Module):
    """Images float32 `[B, H, W, 3]`, normalised as by `preprocess` -> patch tokens float32 `[B, T, hidden_size]`.

    H and W are multiples of the patch size p, and T = (H / p) * (W / p), row by row. The tokens are those after the
    final LayerNorm. Attention's softmax and the statistics of LayerNorm are float32 whatever the dtype.

    Attributes:
      version: 2 or 3, of DINO.
      hidden_size: D, the width of a token.
      depth: blocks.
      num_heads: attention heads.
      num_registers: register tokens.
      patch_size: p.
      table_size: rows and columns of the table of positions; 0 for DINOv3, which has none.
      dtype: of activations and of the kernels that they are multiplied with; float32 is multiplied at full precision.
      antialias: whether a table that shrinks is smoothed, as REPA and DINOv2 with registers do it. Without registers,
        transformers does not smooth it.
    """

    version: int
    hidden_size: int
    depth: int
    num_heads: int
    num_registers: int
    patch_size: int
    table_size: int
    dtype: jnp.dtype = jnp.float32
    antialias: bool = True

    @nn.compact
    def __call__(self, images: Array) -> Array:
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        arithmetic, epsilon = Arithmetic(self.dtype, plain_matmul), EPSILON[self.version]
        num_prefix = 1 + self.num_registers
        with jax.default_matmul_precision("float32" if self.dtype == jnp.float32 else None):
            patches = patchify(images, self.patch_size)
            x = Dense((self.hidden_size,), ("patch", "embed"), arithmetic, name="patch")(patches)
            if self.version == 2:
                shape = self.table_size, self.table_size, self.hidden_size
                table = self.param("position", logical(normal, (None, None, "embed")), shape)
                table = resample(table, grid, self.antialias)
                x = x + table.reshape(-1, self.hidden_size).astype(self.dtype)
            # DINOv2 adds a position to its class token too, which the prefix contains.
            prefix = self.param("prefix", logical(normal, (None, "embed")), (num_prefix, self.hidden_size))
            prefix = jnp.broadcast_to(prefix.astype(self.dtype), (len(x), *prefix.shape))
            x = jnp.concatenate([prefix, x], axis=1)
            angles = _rope_angles(grid, num_prefix, self.hidden_size // self.num_heads) if self.version == 3 else None
            blocks = scan_steps(_Block, self.depth, nn.broadcast)(self.num_heads, epsilon, arithmetic, name="blocks")
            x, _ = blocks(x, angles)
        return _norm(epsilon, jnp.float32, "norm")(x[:, num_prefix:])


class _Block(nn.Module):
    """One step of the scan: `[B, T, D]` and the angles of `_Attention` -> `[B, T, D]`, None."""

    num_heads: int
    epsilon: float
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, x: Array, angles: Array | None) -> tuple[Array, None]:
        x = nn.with_logical_constraint(x, ("batch", None, "hidden"))
        dtype, size = self.arithmetic.dtype, x.shape[-1]

        def layer_scale(name: str) -> Array:
            return self.param(name, logical(nn.initializers.ones, ("norm",)), (size,)).astype(dtype)

        h = _Attention(self.num_heads, self.arithmetic, name="attention")(
            _norm(self.epsilon, dtype, "norm_1")(x), angles
        )
        x = x + layer_scale("scale_1") * h
        h = Dense((MLP_RATIO * size,), ("embed", "mlp"), self.arithmetic, name="mlp_1")(
            _norm(self.epsilon, dtype, "norm_2")(x)
        )
        h = Dense((size,), ("mlp", "embed"), self.arithmetic, name="mlp_2")(nn.gelu(h, approximate=False))
        return x + layer_scale("scale_2") * h, None


class _Attention(nn.Module):
    """Multi-head self-attention over `[B, T, D]`; queries and keys are rotated by angles `[T, D / heads / 2]`, if any.

    The published DINOv3 has no bias of keys; here it is zero.
    """

    num_heads: int
    arithmetic: Arithmetic

    @nn.compact
    def __call__(self, x: Array, angles: Array | None) -> Array:
        b, tokens, size = x.shape
        qkv = Dense((3, size), ("embed", "qkv", "heads"), self.arithmetic, name="qkv")(x)
        qkv = qkv.reshape(b, tokens, 3, self.num_heads, size // self.num_heads)
        q, k, v = (jnp.squeeze(x, 2) for x in jnp.split(qkv, 3, axis=2))
        if angles is not None:
            q, k = _rotate(q, angles), _rotate(k, angles)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (size // self.num_heads) ** -0.5).astype(x.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return Dense((size,), ("heads", "embed"), self.arithmetic, name="out")(out.reshape(b, tokens, size))


def _norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon,
        dtype=dtype,
        scale_init=logical(nn.initializers.ones, ("norm",)),
        bias_init=logical(nn.initializers.zeros, ("norm",)),
        use_fast_variance=False,
        name=name,
    )


def rope_periods(head_size: int) -> np.ndarray:
    """Periods `[head_size / 4]` of DINOv3's rotation, from 1 up to almost `ROPE_BASE`, in halves of the image."""
    return ROPE_BASE ** (np.arange(head_size // 4) / (head_size // 4))


def _rope_angles(grid: tuple[int, int], num_prefix: int, head_size: int) -> np.ndarray:
    """Angles float32 `[num_prefix + h * w, head_size / 2]` for a grid of h rows and w columns of patches.

    The first half of them is that of a patch's row, the second that of its column; rows and columns go from -1 to 1 at
    the edges of the image. The prefix does not turn.
    """
    row, column = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in grid), indexing="ij")
    angles = [2 * np.pi * position.reshape(-1, 1) / rope_periods(head_size) for position in (row, column)]
    return np.pad(np.concatenate(angles, axis=1), ((num_prefix, 0), (0, 0))).astype(np.float32)


def _rotate(x: Array, angles: Array) -> Array:
    """Turns feature i of x `[B, T, heads, 2 * n]` and feature i + n by the angle i of `[T, n]`, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def initial(model: Dino) -> dict:
    """The params tree of `model` with random values, in linen's boxes: with `sharding.abstract`, its shardings."""
    side = model.patch_size
    return model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def features(model: Dino, params: dict, images: Array, grid: int) -> Array:
    """What an image shows where, as REPA asks for it.

    Args:
      model: the encoder.
      params: its params tree.
      images: float32 `[B, H, W, 3]` in [-1, 1], of any size.
      grid: rows and columns of tokens.

    Returns:
      Patch tokens float32 `[B, grid * grid, hidden_size]`.
    """
    return model.apply({"params": params}, preprocess(images, grid * model.patch_size))


def preprocess(images: Array, size: int) -> Array:
    """Images float32 `[B, H, W, 3]` in [-1, 1] -> `[B, size, size, 3]`, normalised by ImageNet's mean and deviation."""
    images = ((images.astype(jnp.float32) + 1) / 2 - jnp.array(MEAN)) / jnp.array(STD)
    return resample(images, (size, size), antialias=False)


def resample(x: Array, size: tuple[int, int], antialias: bool) -> Array:
    """Bicubic resampling float32 `[..., H, W, C]` -> `[..., *size, C]`, as PyTorch's interpolate computes it."""
    rows, columns = (_bicubic(s, t, antialias) for s, t in zip(x.shape[-3:-1], size, strict=True))
    return jnp.einsum("hH,wW,...HWC->...hwC", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache
def _bicubic(source: int, target: int, antialias: bool) -> np.ndarray:
    """The weights float32 `[target, source]` of `source` samples of a line in each of `target` samples of it.

    PyTorch's two forms differ by more than the smoothing. Without it, Keys' kernel has a = -0.75, and the outermost
    samples go on beyond the ends. With it, a = -0.5, the kernel is as wide as the samples of the result are apart, and
    what would lie beyond the ends is left out.
    """
    a, width = (-0.5, max(1, source / target)) if antialias else (-0.75, 1)
    margin = int(2 * width) + 1
    samples = np.arange(-margin, source + margin)
    scale = np.float64(np.float32(source / target))  # the centres are rounded where PyTorch rounds them
    centres = (scale * (np.arange(target)[:, None] + 0.5) - 0.5).astype(np.float32)
    x = np.abs(samples - centres) / width
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    if antialias:
        weights *= (samples >= 0) & (samples < source)
    weights = weights @ np.eye(source)[np.clip(samples, 0, source - 1)]
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
