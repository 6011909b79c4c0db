"""Weights of SiT under their official PyTorch names (willisma/SiT) <-> parameters of the residual `models.SiT`.

Linear kernels are transposed, the patch convolution's (c, p, q) becomes the (p, q, c) of `layers.patchify`, and the
blocks are stacked on a leading axis `[depth, ...]` for the scan. The head's (p, q, c) agrees; the fused
qkv, `[D, 3D]`, becomes `[D, 3, D]`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dar_jax.config import SIZES
from dar_jax.errors import UserError
from dar_jax.models.layers import position_table
from dar_jax.pretrained.state_dict import to_numpy

# A linear layer of the params tree (of its leaves kernel and bias) -> its official name.
_LAYERS = {
    "timestep/dense_0": "t_embedder.mlp.0",
    "timestep/dense_1": "t_embedder.mlp.2",
    "head/adaln": "final_layer.adaLN_modulation.1",
    "head/dense": "final_layer.linear",
}
_QKV = "attention/qkv"
_BLOCK_LAYERS = {  # below stack/steps/block_0 and blocks.N
    _QKV: "attn.qkv",
    "attention/out": "attn.proj",
    "mlp/dense_0": "mlp.fc1",
    "mlp/dense_1": "mlp.fc2",
    "adaln": "adaLN_modulation.1",
}
_BLOCK = "stack/steps/block_0"
_PATCH, _TABLE, _POSITION = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"


def infer_model(state_dict: Mapping[str, Any], num_heads: int | None = None) -> dict[str, Any]:
    """The fields of `config.model` that the weights determine.

    The number of heads leaves no trace in them: it is the published one of this depth and width unless given.

    Args:
      state_dict: arrays or torch tensors under the official names.
      num_heads: attention heads, for sizes other than S, B, L and XL.

    Returns:
      input_size, channels, num_classes, patch_size, hidden_size, depth, num_heads, mlp_ratio and learn_sigma.

    Raises:
      UserError: a key is missing, unexpected or of a shape that does not fit the others, `pos_embed` is not the fixed
        table, or num_heads is unknown or does not divide the width.
    """
    fields = _structure(state_dict)
    depth, size = fields["depth"], fields["hidden_size"]
    published = [s["num_heads"] for s in SIZES.values() if (s["depth"], s["hidden_size"]) == (depth, size)]
    if num_heads is None and not published:
        raise UserError(
            f"--num_heads is required: {depth} blocks of width {size} are no published size, and the weights do not "
            "tell their number of heads."
        )
    num_heads = published[0] if num_heads is None else num_heads
    if num_heads < 1 or size % num_heads:
        raise UserError(f"--num_heads = {num_heads} must divide the width of the weights, {size}.")
    return {**fields, "num_heads": num_heads}


def params_from_torch(state_dict: Mapping[str, Any]) -> dict:
    """The params tree of the residual `models.SiT`, float32 numpy arrays, from official weights of any size.

    `state_dict` holds numpy arrays or torch tensors. `pos_embed` is compared with our own table and not kept. Raises
    UserError as `infer_model` does.
    """
    fields = _structure(state_dict)
    leaves = {"label/table": to_numpy(state_dict[_TABLE])}
    patch = to_numpy(state_dict[_PATCH])  # [D, C, p, p]
    leaves["patch/kernel"] = patch.transpose(2, 3, 1, 0).reshape(-1, len(patch))
    leaves["patch/bias"] = to_numpy(state_dict["x_embedder.proj.bias"])
    for ours, official in _LAYERS.items():
        leaves[f"{ours}/kernel"] = to_numpy(state_dict[f"{official}.weight"]).T
        leaves[f"{ours}/bias"] = to_numpy(state_dict[f"{official}.bias"])
    for ours, official in _BLOCK_LAYERS.items():
        names = [f"blocks.{n}.{official}" for n in range(fields["depth"])]
        kernels = np.stack([to_numpy(state_dict[f"{name}.weight"]).T for name in names])  # [depth, I, O]
        biases = np.stack([to_numpy(state_dict[f"{name}.bias"]) for name in names])
        if ours == _QKV:
            kernels, biases = (x.reshape(*x.shape[:-1], 3, -1) for x in (kernels, biases))
        leaves[f"{_BLOCK}/{ours}/kernel"], leaves[f"{_BLOCK}/{ours}/bias"] = kernels, biases
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = np.ascontiguousarray(leaf)
    return tree


def params_to_torch(params: dict, *, patch_size: int, input_size: int) -> dict[str, np.ndarray]:
    """The inverse of `params_from_torch`, bit for bit: numpy arrays under the official names, with `pos_embed`.

    Args:
      params: of a residual `models.SiT`, or a tree of the same structure (gradients, say).
      patch_size: p, which a flattened patch kernel does not tell.
      input_size: height = width of the model's input, for the position table.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    patch = leaves["patch/kernel"]
    size = patch.shape[-1]
    state_dict = {
        _POSITION: position_table(input_size // patch_size, size)[None],
        _PATCH: patch.reshape(patch_size, patch_size, -1, size).transpose(3, 2, 0, 1),
        "x_embedder.proj.bias": leaves["patch/bias"],
        _TABLE: leaves["label/table"],
    }
    for ours, official in _LAYERS.items():
        state_dict[f"{official}.weight"] = leaves[f"{ours}/kernel"].T
        state_dict[f"{official}.bias"] = leaves[f"{ours}/bias"]
    for ours, official in _BLOCK_LAYERS.items():
        kernels, biases = (leaves[f"{_BLOCK}/{ours}/{leaf}"] for leaf in ("kernel", "bias"))
        if ours == _QKV:
            kernels, biases = (x.reshape(*x.shape[:-2], -1) for x in (kernels, biases))
        for n, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            state_dict[f"blocks.{n}.{official}.weight"], state_dict[f"blocks.{n}.{official}.bias"] = kernel.T, bias
    return {name: np.ascontiguousarray(array) for name, array in state_dict.items()}


def _structure(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `infer_model` but num_heads; every key and shape is checked against them."""

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in state_dict:
            raise UserError(f'the weights lack the key "{key}" of SiT.')
        found = tuple(state_dict[key].shape)
        if len(found) != rank or 0 in found:
            raise UserError(f'"{key}" has shape {found}, which is not of rank {rank}.')
        return found

    size, channels, patch_size, _ = shape(_PATCH, 4)
    num_classes = shape(_TABLE, 2)[0] - 1
    tokens = shape(_POSITION, 3)[1]
    grid = math.isqrt(tokens)
    hidden = shape("blocks.0.mlp.fc1.weight", 2)[0]
    out = shape("final_layer.linear.weight", 2)[0]
    learn_sigma = out == 2 * patch_size**2 * channels
    depth = len({m[1] for key in state_dict if (m := re.match(r"blocks\.(\d+)\.", key))})

    expected = {
        _PATCH: (size, channels, patch_size, patch_size),
        "x_embedder.proj.bias": (size,),
        _POSITION: (1, grid**2, size),
        _TABLE: (num_classes + 1, size),
    }
    linear = {
        "t_embedder.mlp.0": (size, 256),
        "t_embedder.mlp.2": (size, size),
        "final_layer.adaLN_modulation.1": (2 * size, size),
        "final_layer.linear": (patch_size**2 * channels * (2 if learn_sigma else 1), size),
    }
    for n in range(depth):
        shapes = (3 * size, size), (size, size), (hidden, size), (size, hidden), (6 * size, size)
        linear.update({f"blocks.{n}.{name}": s for name, s in zip(_BLOCK_LAYERS.values(), shapes, strict=True)})
    for name, (rows, columns) in linear.items():
        expected[f"{name}.weight"], expected[f"{name}.bias"] = (rows, columns), (rows,)

    for key, wanted in expected.items():
        if shape(key, len(wanted)) != wanted:
            raise UserError(f'"{key}" has shape {shape(key, len(wanted))}, but the other weights ask for {wanted}.')
    if unexpected := sorted(set(state_dict) - set(expected)):
        raise UserError(f'the weights have the key "{unexpected[0]}", which SiT has not.')
    if not np.allclose(to_numpy(state_dict[_POSITION])[0], position_table(grid, size), atol=1e-5):
        raise UserError(f'"{_POSITION}" is not the fixed sin-cos table of {grid} x {grid} tokens.')
    return {
        "input_size": grid * patch_size,
        "channels": channels,
        "num_classes": num_classes,
        "patch_size": patch_size,
        "hidden_size": size,
        "depth": depth,
        "mlp_ratio": hidden / size,
        "learn_sigma": learn_sigma,
    }


def layers() -> tuple[dict[str, str], dict[str, str], str]:
    """Official names of linear layers by ours: outside of the blocks, below a block, and of the list of blocks."""
    return _LAYERS, _BLOCK_LAYERS, "blocks"
