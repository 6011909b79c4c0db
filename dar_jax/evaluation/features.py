"""Feature networks: the Inception network of FID, or for small images a convnet trained on the training split."""

import functools
import json
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax import files, sharding
from dar_jax.errors import UserError
from dar_jax.pretrained import inception
from dar_jax.pretrained.state_dict import fingerprint

VERSION = 1  # part of the cache's identity: raise it when the network or its training changes
NUM_FEATURES = 64
NUM_STEPS = 600
BATCH_SIZE = 64
NUM_MEASURED = 80  # training batches that give the logged accuracy and the features' scale


class Features(NamedTuple):
    """A frozen feature network.

    `extract` maps uint8 images [B, H, W, C], C = 1 or 3, to float32 features by name, inside or outside jit: "pool"
    [B, F], "logits" [B, classes], and of the Inception network "spatial" [B, 2023] too. `batch_size` is what one
    device takes at a time. `fingerprint` is the SHA-256 of weights that were trained here, and "" of others.
    """

    name: str
    extract: Callable[[Any], dict[str, jax.Array]]
    batch_size: int
    fingerprint: str = ""


def extract_all(features: Features, images: np.ndarray, mesh: Mesh) -> dict[str, np.ndarray]:
    """Features of uint8 images [N, H, W, C] by all devices of `mesh`: float32 [N, F] by name, in every process.

    Every process passes the same images. They are split into equal batches, of which the last is filled up, so that
    one program serves all.
    """
    num_batches = -(-len(images) // (features.batch_size * sharding.batch_shards(mesh)))
    size = sharding.batch_shards(mesh) * -(-len(images) // (num_batches * sharding.batch_shards(mesh)))
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)], mode="edge")
        # From a callback, because device_put would first compare the arrays of all processes.
        array = jax.make_array_from_callback(padded.shape, sharding.batch_sharding(mesh), padded.__getitem__)
        gathered = multihost_utils.process_allgather(features.extract(array), tiled=True)
        parts.append({name: np.asarray(x)[: len(batch)] for name, x in gathered.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def inception_features(path: str, mesh: Mesh) -> Features:
    """The FID Inception network with the weights of `convert --kind=inception`. Raises UserError as `read_params`."""
    params = jax.device_put(inception.read_params(path), NamedSharding(mesh, PartitionSpec()))
    return Features("inception", functools.partial(jax.jit(inception.extract), params), batch_size=32)


class ConvNet(nn.Module):
    """Classifies uint8 images [B, S, S, C]: float32 logits [B, num_classes] and features [B, 64]."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Full precision everywhere: the distance must not depend on the accelerator's default for matmuls.
        precision = jax.lax.Precision.HIGHEST
        x = images.astype(jnp.float32) / 127.5 - 1.0
        width = 16
        while x.shape[1] > 4:
            x = nn.gelu(nn.Conv(width, (3, 3), strides=2, precision=precision)(x))
            width *= 2
        x = x.reshape(x.shape[0], -1)  # positions are kept: where a stroke lies matters
        features = nn.gelu(nn.Dense(NUM_FEATURES, precision=precision)(x))
        return nn.Dense(self.num_classes, precision=precision)(features), features


def convnet_features(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int,
    cache: files.Path | None,
    log: Callable[[str], None] = print,
) -> Features:
    """Trains a small classifier, or reads it back from `cache`; its penultimate activations are the features.

    The 64 features are divided by one scalar, so that their variances over the training images average 1: a
    distance is in units of that variance. The network is the same for the same images, labels and seed; in a
    run of several processes each must pass the same ones.

    Args:
      images: uint8 [N, S, S, C] with 8 <= S <= 64, the real training split.
      labels: int [N] in [0, num_classes).
      num_classes: number of classes.
      seed: initialisation and batch order.
      cache: npz file of the weights; written after training, and read instead of training if it was made from
        these very arguments. None trains always.
      log: receives one line on how the features came about, and one more if the cache could not be read.

    Raises:
      UserError: the images are not square or not of 8 to 64 pixels.
    """
    _, height, width, channels = images.shape
    if height != width or not 8 <= height <= 64:
        raise UserError(
            "the convnet of the inline Frechet distance takes square images of 8 to 64 pixels, "
            f"not {height} x {width}; set config.eval.inception, or config.eval.num_samples = 0 to draw grids only."
        )
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, np.int32)
    identity = {
        "version": VERSION,
        "shape": list(images.shape),
        "num_classes": num_classes,
        "seed": seed,
        "checksum": zlib.crc32(labels, zlib.crc32(images)),
    }
    net = ConvNet(num_classes)
    weights = _read(cache, identity, log) if cache is not None else None
    if weights is None:
        weights = _train(net, images, labels, seed, log)
        if cache is not None:
            _write(cache, identity, weights)

    def extract(images) -> dict[str, jax.Array]:
        if images.dtype != np.uint8 or images.shape[1:] != (height, height, channels):
            raise ValueError(
                f"the features take uint8 images [B, {height}, {height}, {channels}], "
                f"not {images.dtype} {list(images.shape)}."
            )
        logits, features = net.apply({"params": weights["params"]}, jnp.asarray(images))
        return {"pool": features / weights["scale"], "logits": logits}

    return Features("convnet", jax.jit(extract), batch_size=256, fingerprint=fingerprint(weights))


def _train(net: ConvNet, images: np.ndarray, labels: np.ndarray, seed: int, log: Callable[[str], None]) -> dict:
    """Returns {"params": tree, "scale": float32 []} in NumPy and logs the accuracy on training images."""
    start = time.monotonic()
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, NUM_STEPS), weight_decay=1e-2)

    def loss(params, x, y):
        logits, _ = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def predict(params, x):
        logits, features = net.apply({"params": params}, x)
        return logits.argmax(axis=-1), features

    rng = np.random.default_rng(seed)
    needed = NUM_STEPS * BATCH_SIZE
    order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-needed // len(images)))])
    batches = order[:needed].reshape(NUM_STEPS, BATCH_SIZE)
    # A mesh of its own: under the run's mesh all devices of all processes would repeat this work in lockstep.
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("local",))):
        shapes = jax.eval_shape(net.init, jax.random.key(0), images[:1])["params"]
        params = jax.tree.map(lambda shape: _initial(rng, shape.shape), shapes)
        state = optimizer.init(params)
        for batch in batches:
            params, state = step(params, state, images[batch], labels[batch])
        measured = batches[:NUM_MEASURED]
        outputs = [jax.device_get(predict(params, images[batch])) for batch in measured]
        params = jax.device_get(params)
    predicted, features = (np.stack(arrays) for arrays in zip(*outputs, strict=True))  # [M, B], [M, B, 64]
    accuracy = np.mean(predicted == labels[measured])
    scale = np.sqrt(features.astype(np.float64).var(axis=(0, 1)).mean())
    seconds = time.monotonic() - start
    log(f"feature convnet: {accuracy:.1%} of training images right, trained in {seconds:.1f} s")
    return {"params": params, "scale": np.float32(scale)}


def _initial(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """He initialisation of a kernel [..., out], zeros for a bias [out]."""
    # In NumPy, because compiling linen's own initialisation takes longer than the training of digits.
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)


def _write(path: files.Path, identity: dict, weights: dict) -> None:
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, identity=json.dumps(identity), **traverse_util.flatten_dict(weights, sep="/"))


def _read(path: files.Path, identity: dict, log: Callable[[str], None]) -> dict | None:
    """Returns the weights if `path` holds those of `identity`, else None."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as content, np.load(content) as file:
            arrays = dict(file)
        if json.loads(str(arrays.pop("identity"))) != identity:
            return None
    except Exception as error:  # a damaged file fails in many ways, and the cure is the same for all
        log(f"feature convnet: cannot read {path} ({type(error).__name__}), training again")
        return None
    log(f"feature convnet: weights from {path}")
    return traverse_util.unflatten_dict(arrays, sep="/")
