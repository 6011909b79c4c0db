"""Weights of Qwen-Image's transformer under their published names (diffusers) <-> parameters of `models.mmdit.MMDiT`.

Every published tensor is one slice of one leaf, so that a reader can place one tensor after the other: linear kernels
are transposed, and the blocks are stacked on a leading axis `[depth, ...]` for the scan.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from dar_jax.errors import UserError
from dar_jax.pretrained.state_dict import to_numpy

# A layer of the params tree -> its published name.
_LAYERS = {
    "image": "img_in",
    "text_norm": "txt_norm",
    "text": "txt_in",
    "timestep/dense_0": "time_text_embed.timestep_embedder.linear_1",
    "timestep/dense_1": "time_text_embed.timestep_embedder.linear_2",
    "head/adaln": "norm_out.linear",
    "head/dense": "proj_out",
}
_BLOCK_LAYERS = {  # below stack/steps/block_0 and transformer_blocks.N
    "image/adaln": "img_mod.1",
    "image/q": "attn.to_q",
    "image/k": "attn.to_k",
    "image/v": "attn.to_v",
    "image/q_norm": "attn.norm_q",
    "image/k_norm": "attn.norm_k",
    "image/out": "attn.to_out.0",
    "image/mlp/dense_0": "img_mlp.net.0.proj",
    "image/mlp/dense_1": "img_mlp.net.2",
    "text/adaln": "txt_mod.1",
    "text/q": "attn.add_q_proj",
    "text/k": "attn.add_k_proj",
    "text/v": "attn.add_v_proj",
    "text/q_norm": "attn.norm_added_q",
    "text/k_norm": "attn.norm_added_k",
    "text/out": "attn.to_add_out",
    "text/mlp/dense_0": "txt_mlp.net.0.proj",
    "text/mlp/dense_1": "txt_mlp.net.2",
}
_BLOCK = "stack/steps/block_0"
_OURS = {official: ours for ours, official in _LAYERS.items()}
_OURS_IN_BLOCK = {official: f"{_BLOCK}/{ours}" for ours, official in _BLOCK_LAYERS.items()}


class Place(NamedTuple):
    """Where a published tensor stands in the params tree.

    Attributes:
      path: of the leaf, as in "stack/steps/block_0/text/q/kernel".
      block: its index on the leaf's leading axis; None: the tensor is the whole leaf.
      transposed: whether the leaf is the transpose, as kernels of linear layers are.
    """

    path: str
    block: int | None
    transposed: bool


def place(name: str) -> Place:
    """Where the tensor of a published name belongs. Raises UserError for a name that Qwen-Image has not."""
    layer, _, kind = name.rpartition(".")
    block = None
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer):
        block, ours = int(match[1]), _OURS_IN_BLOCK.get(match[2])
    else:
        ours = _OURS.get(layer)
    is_norm = ours is not None and ours.endswith("_norm")
    leaf = {"weight": "scale"} if is_norm else {"weight": "kernel", "bias": "bias"}
    if ours is None or kind not in leaf:
        raise UserError(f'the weights have the key "{name}", which Qwen-Image has not.')
    return Place(f"{ours}/{leaf[kind]}", block, leaf[kind] == "kernel")


def names(depth: int) -> Iterator[str]:
    """The published names of all tensors of a model of `depth` blocks: 13, and 32 a block."""
    layers = [*_LAYERS.items()]
    layers += [
        (ours, f"transformer_blocks.{n}.{official}") for n in range(depth) for ours, official in _BLOCK_LAYERS.items()
    ]
    for ours, official in layers:
        yield f"{official}.weight"
        if not ours.endswith("_norm"):
            yield f"{official}.bias"


def params_from_torch(state_dict: Mapping[str, Any]) -> dict:
    """The params tree of the residual `MMDiT`, float32 numpy arrays, from published weights of any size.

    `state_dict` holds numpy arrays or torch tensors. Raises UserError if a tensor is missing, unknown or of another
    shape than its like in the first block.
    """
    depth = 1 + max((place(name).block or 0 for name in state_dict), default=-1)
    leaves: dict[str, np.ndarray] = {}
    for name in names(depth):
        if name not in state_dict:
            raise UserError(f'the weights lack the key "{name}" of Qwen-Image.')
        path, block, transposed = place(name)
        tensor = to_numpy(state_dict[name])
        tensor = tensor.T if transposed else tensor
        if block is None:
            leaves[path] = np.ascontiguousarray(tensor)
            continue
        leaf = leaves.setdefault(path, np.empty((depth, *tensor.shape), tensor.dtype))
        if leaf.shape[1:] != tensor.shape:
            raise UserError(f'"{name}" has another shape than its like in the first block.')
        leaf[block] = tensor
    return traverse_util.unflatten_dict(leaves, sep="/")


def params_to_torch(params: dict) -> dict[str, np.ndarray]:
    """The inverse of `params_from_torch`, bit for bit: numpy arrays under the published names.

    `params` are of a residual `MMDiT`, or a tree of the same structure (gradients, say).
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    depth = len(leaves[f"{_BLOCK}/image/adaln/bias"])

    def tensor(name: str) -> np.ndarray:
        path, block, transposed = place(name)
        leaf = np.asarray(leaves[path] if block is None else leaves[path][block])
        return np.ascontiguousarray(leaf.T if transposed else leaf)

    return {name: tensor(name) for name in names(depth)}


def layers() -> tuple[dict[str, str], dict[str, str], str]:
    """Published names of layers by ours: outside of the blocks, below a block, and of the list of blocks."""
    return _LAYERS, _BLOCK_LAYERS, "transformer_blocks"
