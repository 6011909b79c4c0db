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
PATCH_SIZE = 2  # of the published model; the weights tell its square times the channels
TIME_FEATURES = 256
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


def infer_model(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The fields of `config.model` that the published tensors determine, from their shapes by name.

    Returns channels, patch_size, hidden_size, depth, num_heads and text_size. Raises UserError if a tensor is missing,
    unknown, or of a shape that does not fit the others.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f'the weights lack the key "{name}" of Qwen-Image.')
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise UserError(f'"{name}" has shape {tuple(shapes[name])}, which is not of rank {rank}.')
        return tuple(shapes[name])

    depth = 1 + max([place(name).block or 0 for name in shapes], default=0)
    size, features = shape("img_in.weight", 2)
    _, text_size = shape("txt_in.weight", 2)
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if size % head or features % PATCH_SIZE**2:
        raise UserError(
            f"the weights have heads of {head}, width {size} and patches of {features} features, unlike Qwen-Image."
        )
    wide = {
        **{"image": (size, features), "text": (size, text_size), "text_norm": (text_size,)},
        **{"timestep/dense_0": (size, TIME_FEATURES), "timestep/dense_1": (size, size)},
        **{"head/adaln": (2 * size, size), "head/dense": (features, size)},
        **{"adaln": (6 * size, size), "q": (size, size), "k": (size, size), "v": (size, size), "out": (size, size)},
        **{"q_norm": (head,), "k_norm": (head,), "mlp/dense_0": (4 * size, size), "mlp/dense_1": (size, 4 * size)},
    }
    for name in names(depth):
        path, block, _ = place(name)
        layer = path.rpartition("/")[0].removeprefix(f"{_BLOCK}/")
        weight = wide[layer if block is None else layer.partition("/")[2]]
        wanted = weight[:1] if name.endswith(".bias") else weight
        if shape(name, len(wanted)) != wanted:
            raise UserError(f'"{name}" has shape {shape(name, len(wanted))}, but the other weights ask for {wanted}.')
    return {
        "channels": features // PATCH_SIZE**2,
        "patch_size": PATCH_SIZE,
        "hidden_size": size,
        "depth": depth,
        "num_heads": size // head,
        "text_size": text_size,
    }


def tensors_of(leaves: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the published tensors by name, in the published order, from those of the leaves by path.

    Raises UserError if the leaves are not those of a residual `MMDiT`.
    """
    depth = leaves.get(f"{_BLOCK}/image/adaln/bias", (1,))[0]
    shapes, unused = {}, set(leaves)
    for name in names(depth):
        path, block, transposed = place(name)
        if path not in leaves:
            raise UserError(f'the checkpoint lacks "{path}" of a residual MM-DiT, which alone can be exported.')
        shape = leaves[path] if block is None else leaves[path][1:]
        shapes[name] = shape[::-1] if transposed else shape
        unused.discard(path)
    if unused:
        raise UserError(
            f'the checkpoint has "{min(unused)}", which no residual MM-DiT has; that alone can be exported.'
        )
    return shapes


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
