"""Weights in safetensors that are larger than memory: read and written tensor by tensor.

Published models come as one file, or as shards `diffusion_pytorch_model-00001-of-00009.safetensors` with an index that
says in which of them a tensor stands. A tensor's bytes pass through memory, and nothing else does.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dar_jax import files
from dar_jax.errors import UserError

NAME = "diffusion_pytorch_model"
LIMIT = 5 * 10**9  # bytes of tensors in a shard, unless one tensor is larger
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor in a safetensors file: where it is, its shape and its dtype."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Its values. Raises UserError if they cannot be read, or one of them is not finite."""
        with _opened(self.file) as file:  # anew for each, so that the pages of others are given back
            array = file.get_tensor(self.name)
        if not all(np.isfinite(rows).all() for rows in np.array_split(array, 32)):
            raise UserError(f'"{self.name}" in "{self.file}" holds numbers that are not finite; copy the file again.')
        return array


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """`safe_open` of a file, whose errors become UserErrors."""
    try:
        with safe_open(path, "np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f'--input: "{path}" cannot be read ({error}); copy it again.') from error


def find(location: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of an index (.json), or of a directory that has one index or one such file.

    Raises UserError if there is no such file, one cannot be read, a tensor is not where the index says, or is of
    another dtype than bfloat16, float16 or float32.
    """
    path = files.path(location)
    if path.is_dir():
        path = _of_directory(location, path)
    if not path.is_file() or not path.name.endswith((_SUFFIX, _INDEX)):
        raise UserError(
            f'--input = "{location}" must be a file *{_SUFFIX} or *{_INDEX}, or a directory with one of them.'
        )
    if path.name.endswith(_SUFFIX):
        return _tensors(files.local(path))
    index = files.read_json(path, {"weight_map": dict}, "copy it again")["weight_map"]
    tensors = {}
    for shard in sorted({str(shard) for shard in index.values()}):
        if os.path.basename(shard) != shard or not (path.parent / shard).is_file():
            raise UserError(f'--input: "{path.parent / shard}" of {path.name} is missing; copy it again.')
        tensors |= _tensors(files.local(path.parent / shard))
    if missing := sorted(set(index) - set(tensors)):
        name = missing[0]
        raise UserError(f'--input: "{name}" is not in "{index[name]}", as {path.name} says; copy both again.')
    return tensors


def _of_directory(location: str, path: files.Path) -> files.Path:
    for suffix in (_INDEX, _SUFFIX):
        if found := sorted(path.glob(f"*{suffix}")):
            if len(found) > 1:
                raise UserError(f'--input = "{location}" has {len(found)} files *{suffix}; name one of them.')
            return found[0]
    raise UserError(f'--input = "{location}" has no *{_INDEX} and no *{_SUFFIX}; name the folder that has.')


def _tensors(path: pathlib.Path) -> dict[str, Tensor]:
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise UserError(
                    f'"{name}" in "{path}" is of dtype {tensor.get_dtype()}; take weights in {", ".join(DTYPES)}.'
                )
            tensors[name] = Tensor(path, name, tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])
    return tensors


class Slot(NamedTuple):
    """Room for a tensor in a file."""

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def write(self, part: tuple[slice, ...], values: np.ndarray) -> None:
        """Writes a rectangular part of the tensor."""
        array = np.memmap(self.file, self.dtype, "r+", self.offset, self.shape)
        array[part] = values


class Writer:
    """Writes shards and their index to a directory; nothing has its final name before `finish`.

    Attributes:
      slots: the room of every tensor, by name.
    """

    def __init__(self, directory: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        """Makes the files in their full size; `tensors` are shapes and dtypes by name, in the order of the shards.

        Raises UserError if the directory has an index already, or there is no room.
        """
        self._directory = files.path(directory)
        self._index = self._directory / f"{NAME}{_INDEX}"
        if self._index.exists():
            raise UserError(f'--output = "{directory}" holds {self._index.name}; take another.')
        self._tensors = tensors
        self.slots: dict[str, Slot] = {}
        groups = [*_groups(tensors)]
        self._names = {
            f"{NAME}-{i:05d}-of-{len(groups):05d}{_SUFFIX}": group for i, group in enumerate(groups, start=1)
        }
        with files.writing(directory, "--output"):
            self._directory.mkdir(parents=True, exist_ok=True)
            try:
                for shard, group in self._names.items():
                    self._make(self._directory / f"{shard}.tmp", group)
            except OSError:
                for shard in self._names:
                    (self._directory / f"{shard}.tmp").unlink(missing_ok=True)
                raise

    def _make(self, file: pathlib.Path, names: list[str]) -> None:
        codes = {dtype: code for code, dtype in DTYPES.items()}
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            shape, dtype = self._tensors[name]
            end = offset + _size(shape, dtype)
            header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.flush()
            os.posix_fallocate(opened.fileno(), 0, start + offset)  # else a full disk would kill those who write later
        for name in names:
            self.slots[name] = Slot(file, start + header[name]["data_offsets"][0], *self._tensors[name])

    def finish(self) -> None:
        """Gives the files their names, and writes the index."""
        for shard in self._names:
            with open(self._directory / f"{shard}.tmp", "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._directory / f"{shard}.tmp", self._directory / shard)
        total = sum(_size(*tensor) for tensor in self._tensors.values())
        index = {name: shard for shard, names in self._names.items() for name in names}
        files.write_json(self._index, {"metadata": {"total_size": total}, "weight_map": index}, indent=2)


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _groups(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[list[str]]:
    """The names of each shard, as many as fit into it."""
    group, size = [], 0
    for name, tensor in tensors.items():
        if group and size + _size(*tensor) > LIMIT:
            yield group
            group, size = [], 0
        group.append(name)
        size += _size(*tensor)
    yield group


def identity(tensors: Iterable[Tensor]) -> dict[str, list[int]]:
    """Size in bytes and time of change of each file of `tensors`, by its name."""
    paths = sorted({tensor.file for tensor in tensors})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
