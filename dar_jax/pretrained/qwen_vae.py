"""The autoencoder of Qwen-Image for single images (AutoencoderKLQwenImage, f8, 16 channels; arXiv:2508.02324).

The published network is that of the Wan 2.1 video VAE: its convolutions also run over time, and are causal. The first
frame of a video sees zeros in its past, so of a kernel `[3, 3, 3]` only the last slice in time acts on it, and the
layers that halve or double time (`time_conv`) leave it alone. An image is a video of one frame. Here the network is
two-dimensional, and the other slices and `time_conv` are not kept: a converted VAE cannot be turned back into one of
videos. Layers carry the names of diffusers, `down_blocks.0` as `down_blocks_0`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from dar_jax.errors import UserError
from dar_jax.pretrained.autoencoder import PRECISION, Autoencoder, conv
from dar_jax.pretrained.state_dict import to_numpy

# Mean and standard deviation of the latents of images, by channel; they stand in diffusers' config, not in the weights.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
QUERIES = 1024  # of the attention, that a device computes at a time: 1024x1024 pixels are 16,384 tokens

_TIME_CONV = r"(encoder\.down_blocks|decoder\.up_blocks)\.\d+(\.upsamplers\.0)?\.time_conv\.(weight|bias)"


class _Norm(nn.Module):
    """Every pixel's features, divided by their root mean square and scaled."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (size,))
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        return x / jnp.maximum(length, 1e-12) * math.sqrt(size) * gamma


class _Resnet(nn.Module):
    """[B, H, W, C] -> [B, H, W, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.features, 3, "conv1")(nn.silu(_Norm(name="norm1")(x)))
        h = conv(self.features, 3, "conv2")(nn.silu(_Norm(name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, "conv_shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """One head over all pixels; [B, H, W, C] -> the same. Scores are kept for `QUERIES` pixels at a time."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, size = x.shape[0], x.shape[-1]
        qkv = conv(3 * size, 1, "to_qkv")(_Norm(name="norm")(x)).reshape(b, -1, 3 * size)
        q, k, v = jnp.split(qkv, 3, axis=-1)  # [B, T, C]

        def attend(query: Array) -> Array:
            """[B, C] of one pixel -> [B, C]."""
            scores = jnp.einsum("bc,bkc->bk", query, k, precision=PRECISION) / math.sqrt(size)
            return jnp.einsum("bk,bkc->bc", nn.softmax(scores), v, precision=PRECISION)

        h = jax.lax.map(attend, q.swapaxes(0, 1), batch_size=min(QUERIES, q.shape[1])).swapaxes(0, 1)
        return x + conv(size, 1, "proj")(h.reshape(x.shape))


class _MidBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _Resnet(x.shape[-1], name="resnets_0")(x)
        x = _Attention(name="attentions_0")(x)
        return _Resnet(x.shape[-1], name="resnets_1")(x)


class _Downsample(nn.Module):
    """Halves the sides. Only the lower and the right edge are padded, so the result leans to one side."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv(x.shape[-1], 3, "resample_1", strides=2, padding=((0, 1), (0, 1)))(x)


class _Upsample(nn.Module):
    """Doubles the sides by repetition, and halves the width by a convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv(x.shape[-1] // 2, 3, "resample_1")(x.repeat(2, axis=1).repeat(2, axis=2))


class _UpBlock(nn.Module):
    features: int
    last: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(3):
            x = _Resnet(self.features, name=f"resnets_{i}")(x)
        return x if self.last else _Upsample(name="upsamplers_0")(x)


class _Encoder(nn.Module):
    channels: tuple[int, ...]
    latent_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.channels[0], 3, "conv_in")(x)
        for i, features in enumerate(self.channels):  # of each level two resnets and a downsampling, in one list
            x = _Resnet(features, name=f"down_blocks_{3 * i}")(x)
            x = _Resnet(features, name=f"down_blocks_{3 * i + 1}")(x)
            if i < len(self.channels) - 1:
                x = _Downsample(name=f"down_blocks_{3 * i + 2}")(x)
        x = _MidBlock(name="mid_block")(x)
        return conv(2 * self.latent_channels, 3, "conv_out")(nn.silu(_Norm(name="norm_out")(x)))


class _Decoder(nn.Module):
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.channels[-1], 3, "conv_in")(x)
        x = _MidBlock(name="mid_block")(x)
        for i, features in enumerate(reversed(self.channels)):
            x = _UpBlock(features, i == len(self.channels) - 1, name=f"up_blocks_{i}")(x)
        return conv(3, 3, "conv_out")(nn.silu(_Norm(name="norm_out")(x)))


class AutoencoderKLQwenImage(Autoencoder):
    """That of Qwen-Image."""

    channels: tuple[int, ...] = (96, 192, 384, 384)
    latent_channels: int = 16

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return _Encoder(self.channels, self.latent_channels), _Decoder(self.channels)

    def decode(self, z: Array) -> Array:
        """As that of `Autoencoder`; images are cut to [-1, 1], as published."""
        return jnp.clip(super().decode(z), -1, 1)


def is_qwen(state_dict: Mapping[str, Any]) -> bool:
    """Whether arrays under the names of diffusers are those of this autoencoder: it alone has norms with a `gamma`."""
    return any(key.endswith(".gamma") for key in state_dict)


def params_from_torch(state_dict: Mapping[str, Any]) -> tuple[AutoencoderKLQwenImage, dict]:
    """The module and its params tree, float32 numpy arrays, of arrays or torch tensors under the names of diffusers.

    Raises UserError if a key is missing, unexpected or of a shape that does not fit the others.
    """
    rest = dict(state_dict)
    model = _infer_model(rest)
    params = {}
    for path, expected in traverse_util.flatten_dict(_abstract(model), sep="/").items():
        # down_blocks_2/resample_1/kernel is down_blocks.2.resample.1.weight
        key = re.sub(r"_(\d+)", r".\1", path).replace("/", ".")
        key = re.sub(r"\.kernel$", ".weight", key)
        if key not in rest:
            raise UserError(f'the weights lack the key "{key}" of AutoencoderKLQwenImage.')
        array = to_numpy(rest.pop(key))
        found = array.shape
        if key.endswith(".gamma"):
            array = array.reshape(-1) if array.size == max(found, default=0) else array  # [C, 1, 1] or [C, 1, 1, 1]
        elif array.ndim == 5:
            array = array[:, :, -1]  # [O, I, time, H, W]: what acts on the first frame
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        if array.shape != expected.shape:
            raise UserError(
                f'"{key}" has shape {found}, which does not fit the other weights of AutoencoderKLQwenImage.'
            )
        params[path] = np.ascontiguousarray(array)
    if rest := [key for key in rest if not re.fullmatch(_TIME_CONV, key)]:
        raise UserError(f'the weights have the key "{min(rest)}", which AutoencoderKLQwenImage has not.')
    return model, traverse_util.unflatten_dict(params, sep="/")


def _abstract(model: AutoencoderKLQwenImage) -> dict:
    side = model.factor
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def _infer_model(state_dict: Mapping[str, Any]) -> AutoencoderKLQwenImage:
    channels = []
    while (key := f"encoder.down_blocks.{3 * len(channels)}.conv1.weight") in state_dict:
        channels.append(state_dict[key].shape[0] if len(state_dict[key].shape) == 5 else 0)
    if not channels:
        raise UserError(f'the weights lack the key "{key}" of AutoencoderKLQwenImage in diffusers.')
    if 0 in channels:
        raise UserError("the weights have no 3-D convolutions, as AutoencoderKLQwenImage has.")
    latents = state_dict.get("post_quant_conv.bias")
    if latents is None or tuple(latents.shape) != (len(MEAN),):
        found = "are missing" if latents is None else f"have shape {tuple(latents.shape)}"
        raise UserError(
            f'"post_quant_conv.bias" must be of {len(MEAN)} channels, whose mean and deviation are known; they {found}.'
        )
    return AutoencoderKLQwenImage(tuple(channels), len(MEAN))
