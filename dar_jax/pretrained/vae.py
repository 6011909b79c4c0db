"""Autoencoders with their weights, and the one of Stable Diffusion 1.

AutoencoderKL (f8, 4 channels; Rombach et al. 2022, arXiv:2112.10752) is here, and AutoencoderKLQwenImage in `qwen_vae`.
An image becomes a normal distribution over latents, its moments. A diffusion model learns draws z from it, normalised
as (z - shift) * scale, which makes their variance about one. Layers carry the names of diffusers, `down_blocks.0` as
`down_blocks_0`, so that the published weights (stabilityai/sd-vae-ft-ema and -mse) are renamed by one rule.

A converted VAE is a directory: weights/ (orbax, float32) and vae.json with the kind (the name of the class), the
widths, shift and scale, and a fingerprint of the weights, by which latents remember who made them. A vae.json without
a kind is of an AutoencoderKL, and without a shift the shift is 0.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax import files, sharding
from dar_jax.errors import UserError
from dar_jax.pretrained import qwen_vae
from dar_jax.pretrained.autoencoder import PRECISION, Autoencoder, conv
from dar_jax.pretrained.qwen_vae import AutoencoderKLQwenImage
from dar_jax.pretrained.state_dict import fingerprint, to_numpy

SCALE = 0.18215
GROUPS = 32  # of every GroupNorm; leaves no trace in the weights
CHUNK = 8  # images of 256x256 pixels that a device encodes or decodes at a time; each needs about 0.3 GB
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.15


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False, name=name)


class _Resnet(nn.Module):
    """[B, H, W, C] -> [B, H, W, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.features, 3, "conv1")(nn.silu(_norm("norm1")(x)))
        h = conv(self.features, 3, "conv2")(nn.silu(_norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, "conv_shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """One head over all pixels; [B, H, W, C] -> the same."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1]
        h = _norm("group_norm")(x).reshape(x.shape[0], -1, size)  # [B, T, C]
        q, k, v = (nn.Dense(size, precision=PRECISION, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision=PRECISION) / math.sqrt(size)
        h = jnp.einsum("bqk,bkc->bqc", nn.softmax(scores), v, precision=PRECISION)
        return x + nn.Dense(size, precision=PRECISION, name="to_out_0")(h).reshape(x.shape)


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
        return conv(x.shape[-1], 3, "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class _Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv(x.shape[-1], 3, "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class _DownBlock(nn.Module):
    features: int
    last: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(2):
            x = _Resnet(self.features, name=f"resnets_{i}")(x)
        return x if self.last else _Downsample(name="downsamplers_0")(x)


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
        for i, features in enumerate(self.channels):
            x = _DownBlock(features, i == len(self.channels) - 1, name=f"down_blocks_{i}")(x)
        x = _MidBlock(name="mid_block")(x)
        return conv(2 * self.latent_channels, 3, "conv_out")(nn.silu(_norm("conv_norm_out")(x)))


class _Decoder(nn.Module):
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.channels[-1], 3, "conv_in")(x)
        x = _MidBlock(name="mid_block")(x)
        for i, features in enumerate(reversed(self.channels)):
            x = _UpBlock(features, i == len(self.channels) - 1, name=f"up_blocks_{i}")(x)
        return conv(3, 3, "conv_out")(nn.silu(_norm("conv_norm_out")(x)))


class AutoencoderKL(Autoencoder):
    """That of Stable Diffusion 1."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return _Encoder(self.channels, self.latent_channels), _Decoder(self.channels)


_KINDS = {model.__name__: model for model in (AutoencoderKL, AutoencoderKLQwenImage)}


class Vae(NamedTuple):
    """A VAE with its weights.

    Attributes:
      model: the module.
      params: its params tree, float32.
      shift, scale: a diffusion model's latents are (z - shift) * scale; numbers, or one for each channel.
      fingerprint: the SHA-256 of the weights.
    """

    model: AutoencoderKL | AutoencoderKLQwenImage
    params: dict
    shift: float | Sequence[float]
    scale: float | Sequence[float]
    fingerprint: str

    def normalise(self, z: Array) -> Array:
        """Draws z `[..., C]` from the moments of `encode` -> what a diffusion model learns."""
        return (z - jnp.asarray(self.shift, z.dtype)) * jnp.asarray(self.scale, z.dtype)

    def denormalise(self, x: Array) -> Array:
        """The inverse of `normalise`: what `decode` takes."""
        return x / jnp.asarray(self.scale, x.dtype) + jnp.asarray(self.shift, x.dtype)

    def describe(self) -> dict[str, Any]:
        """fingerprint, scale and, unless it is 0, shift, as vae.json and the manifest of prepared data note them."""
        notes = {"fingerprint": self.fingerprint, "scale": self.scale}
        return notes | ({} if self.shift == 0 else {"shift": self.shift})


def from_torch(state_dict: Mapping[str, Any]) -> Vae:
    """The VAE of arrays or torch tensors under the names of diffusers; the names tell which.

    The attention layers of AutoencoderKL may have their old or their new names. Raises UserError if a key is missing,
    unexpected or of a shape that does not fit the others.
    """
    if qwen_vae.is_qwen(state_dict):
        model, params = qwen_vae.params_from_torch(state_dict)
        return Vae(model, params, [*qwen_vae.MEAN], [1 / std for std in qwen_vae.STD], fingerprint(params))
    old = re.compile(rf"(\.attentions\.0)\.({'|'.join(OLD_NAMES)})\.")
    rest = {old.sub(lambda m: f"{m[1]}.{OLD_NAMES[m[2]]}.", key): array for key, array in state_dict.items()}
    model = _infer_model(rest)
    params = {}
    for path, expected in traverse_util.flatten_dict(_abstract(model), sep="/").items():
        # down_blocks_0/resnets_1/norm1/scale is down_blocks.0.resnets.1.norm1.weight
        key = re.sub(r"_(\d+)", r".\1", path).replace("/", ".")
        key = re.sub(r"\.(kernel|scale)$", ".weight", key)
        if key not in rest:
            raise UserError(f'the weights lack the key "{key}" of AutoencoderKL.')
        array = to_numpy(rest.pop(key))
        found = array.shape
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        if array.shape != expected.shape:
            raise UserError(f'"{key}" has shape {found}, which does not fit the other weights of AutoencoderKL.')
        params[path] = np.ascontiguousarray(array)
    if rest:
        raise UserError(f'the weights have the key "{min(rest)}", which AutoencoderKL has not.')
    params = traverse_util.unflatten_dict(params, sep="/")
    return Vae(model, params, 0.0, SCALE, fingerprint(params))


def write(path: str, vae: Vae) -> None:
    """Writes the directory of a VAE. Raises UserError if there is one already or it cannot be written."""
    directory = files.path(path)
    if (directory / "vae.json").exists():
        raise UserError(f'--output = "{path}" holds a VAE; take another.')
    content = {
        "kind": type(vae.model).__name__,
        "channels": vae.model.channels,
        "latent_channels": vae.model.latent_channels,
        **vae.describe(),
    }
    with files.writing(path, "--output"):
        directory.mkdir(parents=True, exist_ok=True)
        ocp.save_pytree(directory / "weights", vae.params, overwrite=True)
        files.write_json(directory / "vae.json", files.seal(content), indent=2)  # last: it marks a whole directory


def read_header(path: str, field: str) -> dict[str, Any]:
    """kind, channels, latent_channels, shift, scale and fingerprint of the directory `path`, without its weights.

    `field` is the flag or config field of the path, for the UserError if there is no VAE, or vae.json is damaged or of
    a kind that this version does not know.
    """
    form = {"channels": [int], "latent_channels": int, "fingerprint": str}
    scaling = {"AutoencoderKL": {"scale": SCALE}, "AutoencoderKLQwenImage": {"shift": [float], "scale": [float]}}
    fix = f"{field} must be a directory that python -m dar_jax.convert --kind=vae has made"
    file = files.path(path) / "vae.json"
    header = {"kind": "AutoencoderKL", "shift": 0.0, **files.read_json(file, form, fix)}
    if str(header["kind"]) not in scaling:
        raise UserError(f'"{file}" is of the kind {header["kind"]!r}, which this version does not know; {fix}.')
    return header | files.read_json(file, scaling[header["kind"]], fix)


def read_factor(path: str, field: str) -> int:
    """Pixels of a side for each latent of it; arguments and errors as of `read_header`."""
    return _model(read_header(path, field)).factor


def _model(header: dict[str, Any]) -> AutoencoderKL | AutoencoderKLQwenImage:
    return _KINDS[header["kind"]](tuple(header["channels"]), header["latent_channels"])


def load(path: str, field: str) -> Vae:
    """Loads a directory that `write` made; weights are numpy arrays.

    `field` is the flag or config field of the path, for the UserError if there is no VAE or its weights are not those
    of its fingerprint.
    """
    header = read_header(path, field)
    model = _model(header)
    try:
        restore = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _abstract(model))
        params = ocp.load_pytree(files.path(path) / "weights", restore)
        damaged = fingerprint(params) != header["fingerprint"]
    except Exception as error:  # orbax raises what its readers happen to
        raise UserError(f'{field} = "{path}": the weights cannot be read ({error}); convert them again.') from error
    if damaged:
        raise UserError(f'{field} = "{path}": the weights are not those of vae.json; convert them again.')
    return Vae(model, params, header["shift"], header["scale"], header["fingerprint"])


def make_encoder(vae: Vae, mesh: Mesh) -> Callable[[Array], Array]:
    """Returns images [B, H, W, 3] -> moments float32 [B, 2, h, w, C], not normalised, as `AutoencoderKL.encode`.

    Images are uint8, or float32 in [-1, 1]. B must be divisible by `sharding.batch_shards`; a device takes CHUNK at a
    time, or fewer if they are larger than 256x256 pixels.
    """

    def encode(model: nn.Module, x: Array) -> Array:
        return model.encode(x.astype(jnp.float32) / 127.5 - 1 if x.dtype == jnp.uint8 else x)

    return _on_devices(vae, mesh, encode, pixels=1)


def make_decoder(vae: Vae, mesh: Mesh) -> Callable[[Array], Array]:
    """Returns normalised latents float32 [B, h, w, C] -> images float32 [B, H, W, 3], about in [-1, 1].

    B must be divisible by `sharding.batch_shards`; a device takes as many at a time as `make_encoder`.
    """
    return _on_devices(vae, mesh, lambda model, x: model.decode(vae.denormalise(x)), pixels=vae.model.factor**2)


def _on_devices(
    vae: Vae, mesh: Mesh, method: Callable[[nn.Module, Array], Array], pixels: int
) -> Callable[[Array], Array]:
    """`pixels` of an image belong to one place of the input."""
    batch, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(vae.params, everywhere)

    def local(params, x):
        one = lambda x: vae.model.apply({"params": params}, x[None], method=method)[0]  # noqa: E731
        share = 256**2 / (pixels * x.shape[1] * x.shape[2])
        return jax.lax.map(one, x, batch_size=min(len(x), max(1, int(CHUNK * min(1, share)))))

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(everywhere.spec, batch.spec), out_specs=batch.spec))
    return lambda x: run(params, x)


def _abstract(model: nn.Module) -> dict:
    side = model.factor
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def _infer_model(state_dict: Mapping[str, Any]) -> AutoencoderKL:
    channels = []
    while (key := f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight") in state_dict:
        channels.append(len(state_dict[key]) if len(state_dict[key].shape) == 4 else 0)
    latents = state_dict.get("post_quant_conv.bias")
    if not channels or latents is None or 0 in latents.shape:
        key = "post_quant_conv.bias" if channels else key
        raise UserError(f'the weights lack the key "{key}" of AutoencoderKL in diffusers.')
    if bad := [width for width in channels if width < 1 or width % GROUPS]:
        raise UserError(f"the weights have a layer of {bad[0]} channels, which {GROUPS} groups do not divide.")
    return AutoencoderKL(tuple(channels), math.prod(latents.shape))
