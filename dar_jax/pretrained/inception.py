"""InceptionV3 as it was released in 2015: the network behind FID, sFID and the Inception score.

It differs from the published InceptionV3: average pools do not count padding, the last block takes a maximum where
others average, the head has 1008 classes, and images are resized as TensorFlow 1 did it. Layers carry the names of
torchvision, in which pytorch-fid distributes the weights; `mixed_6` of the TensorFlow graph is `Mixed_6d`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dar_jax import files
from dar_jax.errors import UserError
from dar_jax.pretrained.state_dict import to_numpy

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
SIDE = 299
SPATIAL_CHANNELS = 7  # of the 17 x 17 map: 2023 features, about as many as the pool's 2048 (Nash et al., 2021)
_EPSILON = 1e-3  # of every batch norm


class _Conv(nn.Module):
    """Convolution and ReLU; the batch norm between them is folded into the weights by `params_from_torch`."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Full precision: a distance must not depend on the accelerator's default for convolutions.
        precision = jax.lax.Precision.HIGHEST
        return nn.relu(
            nn.Conv(self.features, self.kernel, self.stride, self.padding, precision=precision, name="conv")(x)
        )


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class _BlockA(nn.Module):
    """35 x 35."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        five = _Conv(48, name="branch5x5_1")(x)
        three = _Conv(64, name="branch3x3dbl_1")(x)
        three = _Conv(96, (3, 3), name="branch3x3dbl_2")(three)
        outputs = (
            _Conv(64, name="branch1x1")(x),
            _Conv(64, (5, 5), name="branch5x5_2")(five),
            _Conv(96, (3, 3), name="branch3x3dbl_3")(three),
            _Conv(self.pool_features, name="branch_pool")(_average(x)),
        )
        return jnp.concatenate(outputs, axis=-1)


class _BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x):
        three = _Conv(64, name="branch3x3dbl_1")(x)
        three = _Conv(96, (3, 3), name="branch3x3dbl_2")(three)
        outputs = (
            _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            _Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(three),
            _halve(x),
        )
        return jnp.concatenate(outputs, axis=-1)


class _BlockC(nn.Module):
    """17 x 17."""

    channels_7x7: int

    @nn.compact
    def __call__(self, x):
        seven, twice = x, x
        for i, kernel in enumerate([(1, 1), (1, 7), (7, 1)], start=1):
            seven = _Conv(192 if i == 3 else self.channels_7x7, kernel, name=f"branch7x7_{i}")(seven)
        for i, kernel in enumerate([(1, 1), (7, 1), (1, 7), (7, 1), (1, 7)], start=1):
            twice = _Conv(192 if i == 5 else self.channels_7x7, kernel, name=f"branch7x7dbl_{i}")(twice)
        pool = _Conv(192, name="branch_pool")(_average(x))
        return jnp.concatenate((_Conv(192, name="branch1x1")(x), seven, twice, pool), axis=-1)


class _BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        three = _Conv(192, name="branch3x3_1")(x)
        seven = x
        for i, kernel in enumerate([(1, 1), (1, 7), (7, 1)], start=1):
            seven = _Conv(192, kernel, name=f"branch7x7x3_{i}")(seven)
        outputs = (
            _Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(three),
            _Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven),
            _halve(x),
        )
        return jnp.concatenate(outputs, axis=-1)


class _BlockE(nn.Module):
    """8 x 8."""

    last: bool = False

    @nn.compact
    def __call__(self, x):
        three = _Conv(384, name="branch3x3_1")(x)
        twice = _Conv(448, name="branch3x3dbl_1")(x)
        twice = _Conv(384, (3, 3), name="branch3x3dbl_2")(twice)
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.last else _average(x)
        outputs = (
            _Conv(320, name="branch1x1")(x),
            _Conv(384, (1, 3), name="branch3x3_2a")(three),
            _Conv(384, (3, 1), name="branch3x3_2b")(three),
            _Conv(384, (1, 3), name="branch3x3dbl_3a")(twice),
            _Conv(384, (3, 1), name="branch3x3dbl_3b")(twice),
            _Conv(192, name="branch_pool")(pooled),
        )
        return jnp.concatenate(outputs, axis=-1)


class InceptionV3(nn.Module):
    """float32 [B, 299, 299, 3] in [-1, 1) -> float32 features, by name:

    pool: [B, 2048], of FID, KID, precision and recall.
    spatial: [B, 2023], the first 7 channels of mixed_6 in (row, column, channel) order, of sFID.
    logits: [B, 1008], without the head's bias, as the Inception score has always been computed.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)  # [B, 149, 149, 32]
        x = _Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _halve(_Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))  # [B, 73, 73, 64]
        x = _Conv(80, name="Conv2d_3b_1x1")(x)
        x = _halve(_Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))  # [B, 35, 35, 192]
        for name, pool_features in {"5b": 32, "5c": 64, "5d": 64}.items():
            x = _BlockA(pool_features, name=f"Mixed_{name}")(x)
        x = _BlockB(name="Mixed_6a")(x)  # [B, 17, 17, 768]
        for name, channels in {"6b": 128, "6c": 160, "6d": 160, "6e": 192}.items():
            x = _BlockC(channels, name=f"Mixed_{name}")(x)
            if name == "6d":
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = _BlockD(name="Mixed_7a")(x)  # [B, 8, 8, 1280]
        x = _BlockE(name="Mixed_7b")(x)
        x = _BlockE(last=True, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def resize(images: jax.Array) -> jax.Array:
    """float32 [B, H, W, C] -> [B, 299, 299, C], bilinear as in TensorFlow 1.

    Output pixel i samples the input at i * size / 299, without the half-pixel shift of other libraries, and without a
    filter when it shrinks (ResizeBilinear with align_corners and half_pixel_centers off).
    """
    for axis in (2, 1):
        size = images.shape[axis]
        position = np.arange(SIDE, dtype=np.float32) * (np.float32(size) / np.float32(SIDE))
        low = position.astype(np.int32)
        weight = np.expand_dims(position - low, tuple(range(1, images.ndim - axis)))
        below = jnp.take(images, low, axis)
        images = below + (jnp.take(images, np.minimum(low + 1, size - 1), axis) - below) * weight
    return images


def extract(params: dict, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 [B, H, W, 1 or 3] -> the features of `InceptionV3`; grey is repeated.

    Pixels become (x - 128) / 128, as in the TensorFlow graph: 2 x - 1 of x / 256, not of x / 255.
    """
    x = (resize(images.astype(jnp.float32)) - 128) / 128
    return InceptionV3().apply({"params": params}, jnp.broadcast_to(x, (*x.shape[:3], 3)))


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by path: "Mixed_5b/branch1x1/conv/kernel"."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def params_from_torch(state_dict: Mapping[str, Any]) -> dict:
    """The params of `InceptionV3`, float32 numpy arrays, from the weights of pytorch-fid.

    Every batch norm, in float64, becomes part of the convolution before it; the head's bias is dropped.

    Args:
      state_dict: numpy arrays or torch tensors under the names of torchvision.

    Raises:
      UserError: a key is missing or unexpected, or its shape is not that of the network.
    """
    shapes, rest = _shapes(), {key for key in state_dict if not key.endswith(".num_batches_tracked")}

    def take(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in state_dict:
            raise UserError(f'the weights lack the key "{key}" of the FID Inception network.')
        rest.discard(key)
        if tuple(state_dict[key].shape) != shape:
            raise UserError(
                f'"{key}" has shape {tuple(state_dict[key].shape)}, but the FID Inception network has {shape}; '
                "torchvision's own weights do not fit."
            )
        return to_numpy(state_dict[key]).astype(np.float64)

    leaves = {}
    take("fc.bias", shapes["fc/kernel"][1:])
    leaves["fc/kernel"] = take("fc.weight", shapes["fc/kernel"][::-1]).T
    for path, shape in shapes.items():
        if path.endswith("/conv/kernel"):
            layer = path.removesuffix("/conv/kernel")
            name, (height, width, inputs, outputs) = layer.replace("/", "."), shape
            kernel = take(f"{name}.conv.weight", (outputs, inputs, height, width))
            norm = {
                key: take(f"{name}.bn.{key}", (outputs,)) for key in ("weight", "bias", "running_mean", "running_var")
            }
            scale = norm["weight"] / np.sqrt(norm["running_var"] + _EPSILON)
            leaves[path] = kernel.transpose(2, 3, 1, 0) * scale
            leaves[f"{layer}/conv/bias"] = norm["bias"] - norm["running_mean"] * scale
    if rest:
        raise UserError(f'the weights have the key "{min(rest)}", which the FID Inception network has not.')
    leaves = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def write_params(path: str, params: dict) -> None:
    """Writes an .npz with one array for each parameter. Raises UserError if it cannot."""
    with files.writing(path, "--output"), files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **traverse_util.flatten_dict(params, sep="/"))


def read_params(path: str) -> dict:
    """Reads what `write_params` wrote. Raises UserError if the file is missing, damaged or of another network."""
    if not files.local(path).is_file():
        raise UserError(f'Inception weights "{path}" are no file. {how_to_get()}')
    try:
        with np.load(files.local(path)) as file:
            leaves = dict(file)
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
    except Exception as error:  # a damaged file fails in many ways, and the cure is the same for all
        raise UserError(
            f'Inception weights "{path}" cannot be read ({type(error).__name__}). {how_to_get()}'
        ) from error
    if shapes != _shapes():
        raise UserError(f'"{path}" does not hold converted Inception weights. {how_to_get()}')
    return traverse_util.unflatten_dict(leaves, sep="/")


def how_to_get() -> str:
    """Where the weights are and how to convert them, in one line."""
    return (
        f"Download {WEIGHTS_URL} and run python -m dar_jax.convert --kind=inception "
        f"--input={WEIGHTS_URL.rsplit('/', 1)[1]} --output=inception.npz"
    )
