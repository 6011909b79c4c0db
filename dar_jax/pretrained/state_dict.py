"""PyTorch weights as a state dict: arrays by name. The identity of weights."""

import argparse
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from dar_jax import files
from dar_jax.errors import UserError


def read_state_dict(path: str) -> dict[str, Any]:
    """Reads a state dict from a .npz or .safetensors (arrays by name) or a .pt file (torch.load, weights only).

    Of a training checkpoint, {"ema": ..., "model": ...}, it is the moving average, else the model. Raises UserError
    if the file cannot be read, holds no state dict, or needs a torch that is not installed.
    """
    state_dict = _read(path)
    for name, x in state_dict.items():
        is_tensor = hasattr(x, "detach") and not x.is_complex()
        is_array = isinstance(x, np.ndarray) and (x.dtype.kind in "fiub" or x.dtype.name == "bfloat16")
        if not (isinstance(name, str) and (is_tensor or is_array)):
            raise UserError(f'--input = "{path}" holds "{name}", which is no array of real numbers.')
    return state_dict


def _read(path: str) -> dict[str, Any]:
    file = files.local(path)
    suffix = file.suffix
    if not file.is_file():
        raise UserError(f'--input = "{path}" is no file; name a .pt, .npz or .safetensors of weights.')
    if suffix not in (".pt", ".pth", ".npz", ".safetensors"):
        raise UserError(f'--input = "{path}" must end in .pt, .pth, .npz or .safetensors.')
    if suffix == ".npz":
        try:
            with np.load(file) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged zip raises many things
            raise UserError(f'--input = "{path}" cannot be read as .npz: {error}') from error
    if suffix == ".safetensors":
        try:
            return load_file(file)
        except Exception as error:  # a damaged file raises many things
            raise UserError(f'--input = "{path}" cannot be read as .safetensors: {error}') from error
    try:
        import torch
    except ImportError as error:
        raise UserError(f'--input = "{path}" needs PyTorch to be read: pip install torch.') from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official checkpoints keep their flags so
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler, zip reader or an old format happens to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f'--input = "{path}" cannot be read as a PyTorch file of weights: {reason}') from error
    for key in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return dict(content[key])
    if not isinstance(content, Mapping):
        raise UserError(f'--input = "{path}" holds a {type(content).__name__}, not a state dict.')
    return dict(content)


def to_numpy(x) -> np.ndarray:
    """A torch tensor or an array -> float32 numpy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().float().numpy()
    return np.asarray(x, np.float32)


def fingerprint(params: dict) -> str:
    """SHA-256 of the weights: names, shapes and float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()
