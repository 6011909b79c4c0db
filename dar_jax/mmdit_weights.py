"""Published shards of Qwen-Image's transformer <-> the checkpoint of a workdir, tensor by tensor."""

import functools
from typing import Any

import numpy as np

from dar_jax import files, streaming
from dar_jax.errors import UserError
from dar_jax.pretrained import qwen_image, shards


def find_parts(location: str) -> tuple[dict[str, int], list[streaming.Part], dict[str, Any]]:
    """What `streaming.write_weights` needs of published weights; only their headers are read.

    Args:
      location: a .safetensors file, an index, or a directory with one of them.

    Returns:
      The fields of `qwen_image.infer_model`, a part for each tensor in its own dtype, and the identity of the files.

    Raises:
      UserError: a file or a tensor is missing, unknown or damaged, or has a shape or a dtype that does not fit the
        others.
    """
    tensors = shards.find(location)
    fields = qwen_image.infer_model({name: tensor.shape for name, tensor in tensors.items()})
    parts: list[streaming.Part] = []
    dtypes: dict[str, np.dtype] = {}
    for name in qwen_image.names(fields["depth"]):
        path, block, transposed = qwen_image.place(name)
        tensor = tensors[name]
        if tensor.dtype != dtypes.setdefault(path, tensor.dtype):
            raise UserError(f'"{name}" is {tensor.dtype}, but its like in the first block is {dtypes[path]}.')
        shape = tensor.shape[::-1] if transposed else tensor.shape
        parts.append(streaming.Part(path, block, shape, tensor.dtype, functools.partial(_read, tensor, transposed)))
    return fields, parts, shards.identity(tensors.values())


def _read(tensor: shards.Tensor, transposed: bool) -> np.ndarray:
    values = tensor.read()
    return np.ascontiguousarray(values.T) if transposed else values


def export(workdir: str, directory: str) -> tuple[int, int]:
    """Writes the EMA weights of a workdir as shards with their index, in the dtypes of the checkpoint.

    One chunk of the checkpoint is in memory at a time: a block's matrix of converted weights, a device's share of a
    leaf of a training run.

    Args:
      workdir: of a residual `MMDiT`.
      directory: where to write, without an index yet.

    Returns:
      The number of tensors, and the step of the checkpoint.

    Raises:
      UserError: the workdir has no whole checkpoint or one of another model, or the directory cannot be written.
    """
    if files.is_remote(directory):
        raise UserError(f'--output = "{directory}" must be on a disk.')
    leaves, step = streaming.open_weights(workdir)
    shapes = qwen_image.tensors_of({path: leaf.shape for path, leaf in leaves.items()})
    places = {name: qwen_image.place(name) for name in shapes}
    dtypes = {name: leaves[place.path].dtype.numpy_dtype for name, place in places.items()}
    writer = shards.Writer(directory, {name: (shape, dtypes[name]) for name, shape in shapes.items()})
    names = {(place.path, place.block): name for name, place in places.items()}
    for path, part, values in streaming.read_parts(leaves):
        if (path, None) in names:
            tensors = [(names[path, None], part, values)]
        else:
            blocks = range(part[0].start, part[0].stop)
            tensors = [(names[path, block], part[1:], values[i]) for i, block in enumerate(blocks)]
        for name, where, tensor in tensors:
            if places[name].transposed:
                where, tensor = where[::-1], tensor.T
            writer.slots[name].write(where, tensor)
    writer.finish()
    return len(shapes), step
