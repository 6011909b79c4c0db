"""Checkpoints of weights that are larger than memory: written and read in parts.

`write_weights` makes what `checkpoint.write_weights` makes, a workdir whose step 0 has the item "ema". Orbax writes the
notes of a checkpoint of the same tree with one number in each leaf, as one directory of zarr for each leaf. The leaves
then get their true shapes, and one file for each block of a stack, which is read and compressed in smaller chunks.
Until all is there it stands in workdir/unfinished, where a command that is repeated goes on. What is there after a kill
is whole, since tensorstore renames what it has written.
"""

import contextlib
import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore as ts
from flax import traverse_util
from ml_collections import ConfigDict

from dar_jax import checkpoint, files
from dar_jax.errors import UserError

THREADS = 4  # parts that are written at a time; each needs about three times its size meanwhile
TRIM = 16  # parts after which freed memory is given back
SPLIT = 8  # chunks along each axis of a block's matrix, so that devices of a mesh read little more than their shares
SMALL = 2**20  # numbers of a block that are one chunk
_SOURCE = "source.json"  # in the directory of a step: of which files it was made


class Part(NamedTuple):
    """What is read at once.

    Attributes:
      path: of a leaf, as in "stack/steps/block_0/text/q/kernel".
      block: the index on the leaf's leading axis; None: the whole leaf.
      shape: of the part.
      dtype: of the part.
      read: returns the values.
    """

    path: str
    block: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def write_weights(workdir: str, config: ConfigDict, parts: list[Part], source: dict[str, Any]) -> None:
    """Makes a workdir of converted weights: config.json and, as the EMA of step 0, the leaves that `parts` make up.

    A second call with the same `source`, after the first was killed, writes what is missing.

    Args:
      workdir: on a disk.
      config: of the workdir.
      parts: every block of every leaf, of equal shapes and dtypes in one leaf.
      source: JSON that identifies the files that the parts come from.

    Raises:
      UserError: the workdir holds checkpoints, or the unfinished checkpoint of another source, or cannot be written; or
        a part cannot be read.
    """
    with checkpoint.holding_workdir(workdir):
        if checkpoint.latest_step(workdir) is not None:
            raise UserError(f'--output = "{workdir}" holds checkpoints; take another.')
        if files.is_remote(workdir):
            raise UserError(f'--output = "{workdir}" must be on a disk; copy the directory to the bucket then.')
        checkpoint.claim_workdir(workdir, config)
        unfinished, final = files.path(workdir) / "unfinished", files.path(workdir) / "checkpoints" / "0"
        with files.writing(workdir, "--output"), checkpoint.writing_to(workdir):
            _begin(unfinished, parts, source)
            _write_parts(unfinished / "ema", parts)
            for lock in unfinished.rglob("*.__lock"):  # of tensorstore, if it was killed
                lock.unlink()
            checkpoint.write_checksums(unfinished)
            final.parent.mkdir(exist_ok=True)
            os.replace(unfinished, final)


def _begin(unfinished: files.Path, parts: list[Part], source: dict[str, Any]) -> None:
    """Makes the directory of a checkpoint of empty leaves, unless there is that of this source."""
    notes = unfinished / _SOURCE
    if notes.exists():
        if files.read_json(notes, dict, f"remove {unfinished}") != source:
            raise UserError(f'"{unfinished}" is of other files; remove it, or take another --output.')
        return
    if unfinished.exists():
        files.remove_tree(unfinished)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        count = () if part.block is None else (1 + max(part.block, shapes.get(part.path, (0,))[0] - 1),)
        shapes[part.path] = (*count, *part.shape)
    leaves = {part.path: np.zeros([1] * len(shapes[part.path]), part.dtype) for part in parts}
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save_checkpointables(unfinished, {"ema": traverse_util.unflatten_dict(leaves, sep="/")})
    stacked = {part.path for part in parts if part.block is not None}
    for path, shape in shapes.items():
        leaf = _directory(unfinished / "ema", path)
        chunk = (1, *shape[1:]) if path in stacked else shape
        inner = chunk if math.prod(chunk) <= SMALL else tuple(n // math.gcd(n, SPLIT) for n in chunk)
        array = json.loads((leaf / "zarr.json").read_text())
        array["shape"] = list(shape)
        array["chunk_grid"]["configuration"]["chunk_shape"] = list(chunk)
        (codec,) = array["codecs"]  # sharding_indexed
        codec["configuration"]["chunk_shape"] = list(inner)
        (leaf / "zarr.json").write_text(json.dumps(array))
        files.remove_tree(leaf / "c")
    files.write_json(notes, files.seal(source))


def _directory(item: files.Path, path: str) -> files.Path:
    return item / path.replace("/", ".")


def _write_parts(item: files.Path, parts: list[Part]) -> None:
    """Writes the parts that are not there yet, and says how far it is."""

    def file(part: Part) -> files.Path:
        index = [*([] if part.block is None else [part.block]), *(0 for _ in part.shape)]
        return _directory(item, part.path).joinpath("c", *map(str, index))

    def write(part: Part) -> int:
        values = part.read()
        array = _open({"driver": "file", "path": f"{_directory(item, part.path)}/"})
        (array if part.block is None else array[part.block]).write(values).result()
        return values.nbytes

    todo = [part for part in parts if not file(part).exists()]
    total = sum(math.prod(part.shape) * part.dtype.itemsize for part in todo)
    print(f"{len(parts):,} tensors, {len(parts) - len(todo):,} of them are written; {total / 1e9:.3g} GB to write")
    written, reported = 0, time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool, contextlib.closing(pool.map(write, todo)) as sizes:
        for count, size in enumerate(sizes, start=1):
            written += size
            if count % TRIM == 0:
                _give_back_memory()
            if time.monotonic() - reported > files.REPORT_SECONDS:
                reported = time.monotonic()
                print(f"{count:,} of {len(todo):,} tensors, {written / 1e9:.3g} of {total / 1e9:.3g} GB", flush=True)


def _give_back_memory() -> None:
    """Returns freed memory to the system; glibc else keeps about a megabyte of it for every compressed part."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none
        trim(0)


def _open(kvstore: dict[str, Any], driver: str = "zarr3") -> ts.TensorStore:
    # A chunk of zeros has its file too, so that what is missing is damage.
    spec = {"driver": driver, "kvstore": kvstore, "store_data_equal_to_fill_value": True}
    return ts.open(spec, open=True).result()


def open_weights(workdir: str) -> tuple[dict[str, ts.TensorStore], int]:
    """The leaves by path of the EMA weights of the latest checkpoint that is not damaged, and its step.

    Raises UserError if there is none, or its arrays cannot be opened.
    """
    if files.is_remote(workdir):
        raise UserError(f'--input = "{workdir}" must be on a disk; copy it from the bucket.')
    path, step = checkpoint.find_ema(workdir)
    item = path / "ema"
    try:
        notes = json.loads((item / "_METADATA").read_text())
        driver, leaves = "zarr3" if notes["use_zarr3"] else "zarr", {}
        for entry in notes["tree_metadata"].values():
            name = "/".join(str(key["key"]) for key in entry["key_metadata"])
            if notes["use_ocdbt"]:
                kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}
                kvstore["path"] = f"{name.replace('/', '.')}/"
            else:
                kvstore = {"driver": "file", "path": f"{_directory(item, name)}/"}
            leaves[name] = _open(kvstore, driver)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split(" [")[0]
        raise UserError(f'checkpoint "{path}" cannot be read ({reason}); put a copy in its place.') from error
    return leaves, step


def chunks(array: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """The parts of an array that are stored together."""
    shape, chunk = array.shape, array.chunk_layout.write_chunk.shape
    for index in np.ndindex(*(-(-n // size) for n, size in zip(shape, chunk, strict=True))):
        corner = [i * size for i, size in zip(index, chunk, strict=True)]
        yield tuple(slice(a, min(a + size, n)) for a, size, n in zip(corner, chunk, shape, strict=True))


def read_parts(leaves: Mapping[str, ts.TensorStore]) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
    """Yields (path of a leaf, where a part of it stands, its values), one chunk as it is stored at a time."""
    for path, array in leaves.items():
        for part in chunks(array):
            yield path, part, array[part].read().result()
