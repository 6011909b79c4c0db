"""The smallest things to prepare: folders of little images, and an autoencoder with random weights."""

import functools
import hashlib

import numpy as np
from PIL import Image

from dar_jax.config import default
from dar_jax.data import prepare
from dar_jax.data.sources import open_source
from dar_jax.pretrained import vae as vae_lib
from tests.parity import torch_vae

CLASSES = 3


def write_folder(root, count, side=8, damaged=()):
    """PNGs of random pixels; image i is of class i % 3 and comes i-th in that class. Returns them in source order."""
    rng = np.random.default_rng(0)
    images = {}
    for i in range(count):
        path = root / "train" / f"class{i % CLASSES}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[path] = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(images[path]).save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:50])
            del images[path]
    return [(int(path.parent.name[-1]), images[path]) for path in sorted(images)]


@functools.cache
def tiny_vae(seed=0, widths=(32, 32)):
    """f2 for two widths; its distributions are narrow, as those of a trained one."""
    state_dict = torch_vae.randomise(torch_vae.AutoencoderKL(widths), seed).state_dict()
    state_dict["quant_conv.bias"][4:] -= 6  # of the logarithm of the variance
    return vae_lib.from_torch({name: tensor.numpy() for name, tensor in state_dict.items()})


def prepare_folder(root, out, vae=None, *, size=8, dtype="float16", keep=False, shard=5, skip=0, worker=(0, 1)):
    """Returns the lines of progress."""
    data = default().data
    data.source, data.path = "folder", str(root)
    source = open_source(data, "train")
    settings = prepare.describe(source, f"folder:{root}", "train", size, vae, dtype, keep, shard)
    lines = []
    index, count = worker
    prepare.prepare(source, settings, vae, str(out), max_skipped=skip, worker=index, workers=count, say=lines.append)
    return lines


def shards(out):
    """SHA-256 of the shards and of the manifest, by name."""
    files = [*out.glob("*.array_record"), *out.glob("manifest.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
