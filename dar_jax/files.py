"""Files that appear whole or not at all, and their checksums."""

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dar_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | pathlib.Path, *, only_writer: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`. The file written there takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was and the temporary file is removed. Several processes may write at once.
    The temporary name of an `only_writer` is always the same, so that killed processes leave one such file at most.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp" if only_writer else f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | pathlib.Path, content: Any, indent: int | None = None) -> None:
    """Writes `content` as JSON and a line end through `replacing`."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def sha256(path: str | pathlib.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: Iterable[str | pathlib.Path]) -> list[str]:
    """`sha256` of each file, eight files at a time."""
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter
        return list(pool.map(sha256, paths))


@contextlib.contextmanager
def writing(path: str | pathlib.Path, flag: str) -> Iterator[None]:
    """Makes an OSError within the block a UserError that names `flag` and `path`, which cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{flag} = "{path}" cannot be written: {error.strerror}; take another.') from error


def make_parent(path: str | pathlib.Path, flag: str) -> None:
    """Makes the directory of an output file. Raises UserError if it cannot."""
    with writing(path, flag):
        pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
