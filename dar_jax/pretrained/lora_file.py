"""Adapters as files of diffusers and peft <-> trained trees (models/lora.py).

A published adapter of a linear layer is lora_A.weight `[r, I]` and lora_B.weight `[O, r]`, the transposes of A and B.
The file has the adapters alone, because readers refuse keys without "lora". The aggregators of routing are a second
file. A model without routing can read the first one, but it then computes another function than the one trained.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dar_jax import files
from dar_jax.errors import UserError, require
from dar_jax.pretrained import qwen_image, sit
from dar_jax.pretrained.state_dict import to_numpy

ADAPTERS, ROUTING = "pytorch_lora_weights.safetensors", "routing.safetensors"
_FAMILIES = {"sit": sit, "mmdit": qwen_image}  # by config.model.family
_PREFIXES = r"(transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)?"
_MATRIX = re.compile(_PREFIXES + r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight")
_ALPHA = re.compile(_PREFIXES + r"(.+)\.alpha")
_IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}


class Place(NamedTuple):
    """Where a published layer stands: the path of the layer, and its index on the leading axis, None if it has none."""

    path: str
    index: int | None


def places(family: str, depth: int, blocks_per_step: int) -> dict[str, Place]:
    """The places of all layers by published names.

    Args:
      family: of `config.model`.
      depth: blocks.
      blocks_per_step: of the scan that makes up the stack.
    """
    outside, inside, blocks = _FAMILIES[family].layers()
    found = {name: Place(path, None) for path, name in outside.items()}
    for n in range(depth):
        step, i = divmod(n, blocks_per_step)
        found |= {f"{blocks}.{n}.{name}": Place(f"stack/steps/block_{i}/{path}", step) for path, name in inside.items()}
    return found


def to_torch(trained: dict, by_name: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """The adapters of a trained tree under the names of diffusers. Raises UserError for a layer that has no name."""
    leaves = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in traverse_util.flatten_dict(trained, sep="/").items()
        if path.endswith(("/lora_a", "/lora_b"))
    }
    tensors, placed = {}, set()
    for name, (path, index) in by_name.items():
        if f"{path}/lora_a" not in leaves:
            continue
        a, b = (leaves[f"{path}/{leaf}"] for leaf in ("lora_a", "lora_b"))
        placed |= {f"{path}/lora_a", f"{path}/lora_b"}
        a, b = (a, b) if index is None else (a[index], b[index])
        tensors[f"transformer.{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"transformer.{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(len(b), -1).T)
    if nameless := sorted(set(leaves) - placed):
        raise UserError(
            f'the adapter "{nameless[0]}" has no published name; leave its layer out of config.lora.targets.'
        )
    return tensors


def write(directory: str, trained: dict, by_name: Mapping[str, Place], alpha: float) -> str:
    """Writes `directory`/pytorch_lora_weights.safetensors with the header that diffusers reads; returns its path."""
    tensors = to_torch(trained, by_name)
    modules = [name.split(".", 1)[1].removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    rank = next(iter(tensors.values())).shape[0]
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    header = {f"transformer.{name}": value for name, value in settings.items()}
    content = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
    return _write(files.path(directory) / ADAPTERS, tensors, content)


def write_routing(directory: str, routing: dict, settings: dict[str, Any]) -> str:
    """Writes the parameters of aggregators, with `config.model.routing` in the header; returns the path."""
    leaves = {path: np.asarray(x, np.float32) for path, x in traverse_util.flatten_dict(routing, sep="/").items()}
    return _write(files.path(directory) / ROUTING, leaves, {"format": "pt", "routing": json.dumps(settings)})


def _write(path: files.Path, tensors: dict[str, np.ndarray], header: dict[str, str]) -> str:
    with files.writing(path.parent, "--output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, header)
    return str(path)


def read_routing(path: str) -> tuple[dict, dict[str, Any]]:
    """The inverse of `write_routing`."""
    tensors, header = _read(path)
    require("routing" in header, f'"{path}" is no file of routing that dar_jax.convert wrote.')
    return traverse_util.unflatten_dict(tensors, sep="/"), json.loads(header["routing"])


def read(path: str, by_name: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict, float]:
    """A trained tree of adapters, and their scale, from a file of diffusers, peft, ComfyUI or kohya.

    Layers may have different ranks and scales. The smaller ranks are filled up with zeros, and the scales go into B.

    Args:
      path: of a .safetensors file.
      by_name: of the model that is adapted.
      shapes: of its kernels by path, as "stack/steps/block_0/image/q/kernel".

    Raises:
      UserError: a key is not understood, a matrix is missing, or a shape is not that of the layer.
    """
    tensors, header = _read(path)
    pairs = _pairs(path, tensors, json.loads(header.get("lora_adapter_metadata", "{}")), by_name)
    scales = {scale for _, _, scale in pairs.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    rank = max(a.shape[0] for a, _, _ in pairs.values())
    leaves: dict[str, np.ndarray] = {}
    for name, (a, b, scale) in pairs.items():
        place = by_name[name]
        shape = shapes[f"{place.path}/kernel"]
        stacked, (size, *outputs) = (shape[:1], shape[1:]) if place.index is not None else ((), shape)
        require(
            a.shape[1] == size and b.shape == (int(np.prod(outputs)), a.shape[0]),
            f'--input = "{path}": the adapter of "{name}" has the shapes {a.shape} and {b.shape}, which do not suit a '
            f"layer of {size} inputs and {int(np.prod(outputs))} outputs.",
        )
        both = [(f"{place.path}/lora_a", (size, rank), a.T), (f"{place.path}/lora_b", (rank, *outputs), b.T)]
        for leaf, whole, x in both:
            target = leaves.setdefault(leaf, np.zeros((*stacked, *whole), np.float32))
            target = target if place.index is None else target[place.index]
            if leaf.endswith("lora_a"):
                target[:, : x.shape[1]] = x
            else:
                target[: len(x)] = scale / common * x.reshape(len(x), *outputs)
    return traverse_util.unflatten_dict(leaves, sep="/"), common


def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    file = files.local(path)
    require(file.is_file(), f'"{path}" is no file; name a .safetensors file.')
    try:
        with safe_open(file, "np") as opened:
            header = opened.metadata() or {}
        return load_file(file), header
    except Exception as error:  # a damaged file raises many things
        raise UserError(f'"{path}" cannot be read as .safetensors: {error}') from error


def _pairs(path: str, tensors: dict, header: dict, by_name: Mapping[str, Place]) -> dict[str, tuple]:
    """Layer -> A `[r, I]`, B `[O, r]` and the scale."""
    flattened = {name.replace(".", "_"): name for name in by_name}
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = _MATRIX.fullmatch(key) or _ALPHA.fullmatch(key)
        name = match and flattened.get(match[2].replace(".", "_"))
        if name is None:
            raise UserError(f'--input = "{path}" has the key "{key}", which is of no adapter of this model.')
        kind = "alpha" if match.re is _ALPHA else "a" if _IS_A[match[3]] else "b"
        found.setdefault(name, {})[kind] = to_numpy(tensor)
    require(bool(found), f'--input = "{path}" holds no adapter.')
    settings = {name.removeprefix("transformer."): value for name, value in header.items()}
    pairs = {}
    for name, entry in found.items():
        if "a" not in entry or "b" not in entry:
            raise UserError(f'--input = "{path}": the adapter of "{name}" lacks a matrix; it needs lora_A and lora_B.')
        rank = entry["a"].shape[0]
        alpha = entry.get("alpha", _alpha_of(name, settings, rank))
        root = rank**0.5 if settings.get("use_rslora") else rank
        pairs[name] = entry["a"], entry["b"], float(alpha) / root
    return pairs


def _alpha_of(name: str, settings: dict, rank: int) -> float:
    """As the header says; without one diffusers takes the rank."""
    for pattern, alpha in settings.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):  # as peft matches
            return alpha
    return settings.get("lora_alpha", rank)
