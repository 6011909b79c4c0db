"""Published weights of DINOv2 and DINOv3 <-> the params tree of `dino.Dino`, and the directory that holds it.

Weights come under the names of Meta's files (`blocks.0.attn.qkv.weight`) or of transformers
(`encoder.layer.0.attention.attention.query.weight`). Linear kernels are transposed, the patch convolution's (c, p, q)
becomes the (p, q, c) of `layers.patchify`, q, k and v become one kernel `[D, 3, D]`, and the blocks are stacked on a
leading axis `[depth, ...]` for the scan. Class token and registers become one prefix, which includes the position that
DINOv2 gives its class token.

A converted encoder is a directory: weights/ (orbax, float32) and encoder.json with the sizes and a fingerprint of the
weights.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from dar_jax import files, sharding
from dar_jax.errors import UserError
from dar_jax.pretrained.dino import MLP_RATIO, Dino, initial, rope_periods
from dar_jax.pretrained.state_dict import fingerprint, to_numpy

HEAD_SIZE = 64  # of every published encoder; leaves no trace in the weights
_SIZES = ("version", "hidden_size", "depth", "num_heads", "num_registers", "patch_size", "table_size")
_GATED = re.compile(r"\.mlp\.(w12|w1|w2|w3|weights_in|weights_out|gate_proj)\.")


class _Names(NamedTuple):
    """What the tensors are called. `table` is "" where there is none; `qkv` names one layer or three."""

    version: int
    class_token: str
    registers: str
    table: str
    patch: str
    norm: str
    block: str
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str]
    scales: tuple[str, str]
    unused: str  # a pattern of what no patch token needs


_META_2 = _Names(
    version=2,
    class_token="cls_token",
    registers="register_tokens",
    table="pos_embed",
    patch="patch_embed.proj",
    norm="norm",
    block="blocks.{}.",
    qkv=("attn.qkv",),
    out="attn.proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("ls1.gamma", "ls2.gamma"),
    unused=r"mask_token",
)
_META_3 = _META_2._replace(version=3, registers="storage_tokens", table="")
_HUGGING_FACE_2 = _Names(
    version=2,
    class_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    table="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    norm="layernorm",
    block="encoder.layer.{}.",
    qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    unused=r"embeddings\.(mask_token|position_ids)|pooler\..*",
)
_HUGGING_FACE_3 = _HUGGING_FACE_2._replace(
    version=3,
    table="",
    patch="embeddings.patch_embeddings",
    norm="norm",
    block="layer.{}.",
    qkv=tuple(f"attention.{name}_proj" for name in "qkv"),
    out="attention.o_proj",
    mlp=("mlp.up_proj", "mlp.down_proj"),
)


class Encoder(NamedTuple):
    """An encoder with its weights: the params tree of `model`, float32, and the SHA-256 of the weights."""

    model: Dino
    params: dict
    fingerprint: str


def from_torch(state_dict: Mapping[str, Any]) -> Encoder:
    """The encoder of arrays or torch tensors under the names of Meta or transformers; its version is that of the names.

    Raises UserError if a key is missing, unexpected or of a shape that does not fit the others.
    """
    rest = _in_published_names(state_dict)
    names = _find_names(rest)
    if gated := sorted(filter(_GATED.search, rest)):
        raise UserError(f'the weights have the key "{gated[0]}" of a gated MLP (SwiGLU); take a ViT-S, ViT-B or ViT-L.')
    model = _infer_model(rest, names)
    size, depth, take = model.hidden_size, model.depth, functools.partial(_take, rest)
    prefix = [take(names.class_token, 1, 1, size)[0]]
    leaves = {"patch/bias": take(f"{names.patch}.bias", size)}
    patch = take(f"{names.patch}.weight", size, 3, model.patch_size, model.patch_size)
    leaves["patch/kernel"] = patch.transpose(2, 3, 1, 0).reshape(-1, size)
    if names.version == 2:
        table = take(names.table, 1, 1 + model.table_size**2, size)[0]
        prefix[0] = prefix[0] + table[:1]
        leaves["position"] = table[1:].reshape(model.table_size, model.table_size, size)
    if model.num_registers:
        prefix.append(take(names.registers, 1, model.num_registers, size)[0])
    leaves["prefix"] = np.concatenate(prefix)
    leaves["norm/scale"], leaves["norm/bias"] = (take(f"{names.norm}.{leaf}", size) for leaf in ("weight", "bias"))

    hidden = MLP_RATIO * size
    linear = {
        "attention/out": (names.out, size, size),
        "mlp_1": (names.mlp[0], hidden, size),
        "mlp_2": (names.mlp[1], size, hidden),
    }
    blocks = []
    for block in map(names.block.format, range(depth)):
        leaf = {}
        leaf["attention/qkv/kernel"], leaf["attention/qkv/bias"] = _take_qkv(rest, names, block, size)
        for ours, (name, rows, columns) in linear.items():
            leaf[f"{ours}/kernel"] = take(f"{block}{name}.weight", rows, columns).T
            leaf[f"{ours}/bias"] = take(f"{block}{name}.bias", rows)
        for i, scale in enumerate(names.scales, start=1):
            leaf[f"norm_{i}/scale"] = take(f"{block}norm{i}.weight", size)
            leaf[f"norm_{i}/bias"] = take(f"{block}norm{i}.bias", size)
            leaf[f"scale_{i}"] = take(f"{block}{scale}", size)
        blocks.append(leaf)
    leaves |= {f"blocks/{name}": np.stack([leaf[name] for leaf in blocks]) for name in blocks[0]}

    if names == _META_3:
        _check_periods(rest)
    if surplus := sorted(key for key in rest if not re.fullmatch(names.unused, key)):
        raise UserError(f'the weights have the key "{surplus[0]}", which DINOv{names.version} has not.')
    params = traverse_util.unflatten_dict({name: np.ascontiguousarray(x) for name, x in leaves.items()}, sep="/")
    return Encoder(model, params, fingerprint(params))


def _in_published_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays without the two prefixes of blocks that come and go: FSDP's chunks, `model.` of transformers 5.

    The attention of DINOv2 in transformers 5 gets the names that its files have.
    """
    layers = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    layers["o_proj"] = "output.dense"

    def rename(key: str) -> str:
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        key = re.sub(r"^model\.layer\.", "layer.", key)
        return re.sub(r"^(encoder\.layer\.\d+\.attention\.)([qkvo]_proj)\.", lambda m: f"{m[1]}{layers[m[2]]}.", key)

    return {rename(key): array for key, array in state_dict.items()}


def _find_names(state_dict: Mapping[str, Any]) -> _Names:
    def has(start: str) -> bool:
        return any(key.startswith(start) for key in state_dict)

    if has("encoder.layer."):
        return _HUGGING_FACE_2
    if has("layer."):
        return _HUGGING_FACE_3
    if has("blocks."):
        return _META_3 if has(_META_3.registers) or has("rope_embed.") else _META_2
    raise UserError(f'the weights lack the key "{_META_2.block.format(0)}{_META_2.out}.weight" of DINOv2 and DINOv3.')


def _shape(state_dict: Mapping[str, Any], key: str, rank: int) -> tuple[int, ...]:
    if key not in state_dict:
        raise UserError(f'the weights lack the key "{key}".')
    found = tuple(state_dict[key].shape)
    if len(found) != rank or 0 in found:
        raise UserError(f'"{key}" has shape {found}, which is not of rank {rank}.')
    return found


def _take(rest: dict[str, Any], key: str, *shape: int) -> np.ndarray:
    """Moves an array of this shape out of `rest`."""
    if (found := _shape(rest, key, len(shape))) != shape:
        raise UserError(f'"{key}" has shape {found}, but the other weights ask for {shape}.')
    return to_numpy(rest.pop(key))


def _infer_model(state_dict: Mapping[str, Any], names: _Names) -> Dino:
    size, _, patch_size, _ = _shape(state_dict, f"{names.patch}.weight", 4)
    if size % HEAD_SIZE:
        raise UserError(f"the weights have width {size}, which the {HEAD_SIZE} features of a head do not divide.")
    has_registers = names.version == 3 or names.registers in state_dict
    block = re.escape(names.block).replace(r"\{\}", r"(\d+)")
    return Dino(
        version=names.version,
        hidden_size=size,
        depth=len({m[1] for key in state_dict if (m := re.match(block, key))}),
        num_heads=size // HEAD_SIZE,
        num_registers=_shape(state_dict, names.registers, 3)[1] if has_registers else 0,
        patch_size=patch_size,
        table_size=max(1, math.isqrt(_shape(state_dict, names.table, 3)[1] - 1)) if names.version == 2 else 0,
    )


def _take_qkv(rest: dict[str, Any], names: _Names, block: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel `[D, 3, D]` and the bias `[3, D]` of one block's q, k and v."""
    layers = [block + name for name in names.qkv]
    rows = 3 * size // len(layers)
    kernel = np.concatenate([_take(rest, f"{layer}.weight", rows, size) for layer in layers])
    biases = [f"{layer}.bias" for layer in layers]
    if names == _HUGGING_FACE_3:
        query, value = (_take(rest, biases[i], size) for i in (0, 2))
        bias = np.stack([query, np.zeros_like(query), value])
    else:
        bias = np.concatenate([_take(rest, key, rows) for key in biases]).reshape(3, size)
    if names == _META_3:  # the file has a bias of keys, which the network multiplies with a mask of zeros
        if (mask := f"{layers[0]}.bias_mask") in rest:
            bias = bias * _take(rest, mask, rows).reshape(3, size)
        bias[1] = 0
    return kernel.T.reshape(size, 3, size), bias


def _check_periods(rest: dict[str, Any]) -> None:
    """Drops the periods of DINOv3's rotation from Meta's names, which are those of `dino` rounded to bfloat16."""
    if (key := "rope_embed.periods") in rest:
        expected = rope_periods(HEAD_SIZE)
        if not np.allclose(_take(rest, key, *expected.shape), expected, rtol=1e-2):
            raise UserError(f'"{key}" differs from that of the published DINOv3.')


def write(path: str, encoder: Encoder) -> None:
    """Writes the directory of an encoder. Raises UserError if there is one already or it cannot be written."""
    directory = files.path(path)
    if (directory / "encoder.json").exists():
        raise UserError(f'--output = "{path}" holds an encoder; take another.')
    content = {size: getattr(encoder.model, size) for size in _SIZES} | {"fingerprint": encoder.fingerprint}
    with files.writing(path, "--output"):
        directory.mkdir(parents=True, exist_ok=True)
        ocp.save_pytree(directory / "weights", encoder.params, overwrite=True)
        files.write_json(directory / "encoder.json", files.seal(content), indent=2)  # last: it marks a whole directory


def read_header(path: str, field: str) -> dict[str, Any]:
    """The sizes of `build` and the fingerprint of the directory `path`, without its weights.

    `field` is the flag or config field of the path, for the UserError if there is no encoder, or encoder.json is
    damaged.
    """
    form = {size: int for size in _SIZES} | {"fingerprint": str}
    fix = f"{field} must be a directory that python -m dar_jax.convert --kind=dinov2 or --kind=dinov3 has made"
    return files.read_json(files.path(path) / "encoder.json", form, fix)


def build(header: Mapping[str, Any], dtype: jnp.dtype = jnp.float32, antialias: bool = True) -> Dino:
    """The module of a header; `dtype` and `antialias` as of `Dino`."""
    return Dino(**{size: header[size] for size in _SIZES}, dtype=dtype, antialias=antialias)


def load(path: str, field: str) -> Encoder:
    """Loads a directory that `write` made; weights are numpy arrays.

    `field` is the flag or config field of the path, for the UserError if there is no encoder or its weights are not
    those of its fingerprint.
    """
    header = read_header(path, field)
    model = build(header)
    try:
        abstract = sharding.unbox(jax.eval_shape(lambda: initial(model)))
        restore = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
        params = ocp.load_pytree(files.path(path) / "weights", restore)
        fits = jax.tree.map(np.shape, params) == jax.tree.map(np.shape, restore)  # orbax does not insist
        damaged = not fits or fingerprint(params) != header["fingerprint"]
    except Exception as error:  # orbax raises what its readers happen to
        raise UserError(f'{field} = "{path}": the weights cannot be read ({error}); convert them again.') from error
    if damaged:
        raise UserError(f'{field} = "{path}": the weights are not those of encoder.json; convert them again.')
    return Encoder(model, params, header["fingerprint"])


def load_params(path: str, field: str, abstract):
    """The weights of `load` on the devices of a mesh, and in the dtypes, that `abstract` names.

    Every process reads and checks all weights, and keeps the parts of its devices.

    Args:
      path: the directory.
      field: the flag or config field of the path, for the UserErrors of `load`.
      abstract: the params tree of jax.ShapeDtypeStruct with shardings, as
        `sharding.abstract(mesh, lambda: dino.initial(model))` makes it.
    """

    def put(leaf: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, target.sharding, lambda part: leaf[part].astype(target.dtype))

    return jax.tree.map(put, load(path, field).params, abstract)
