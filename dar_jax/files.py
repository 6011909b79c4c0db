"""Files that appear whole or not at all, and their checksums."""

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has no name of its own
        raise
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


@contextlib.contextmanager
def writing(path: str | pathlib.Path, flag: str) -> Iterator[None]:
    """Makes an OSError within the block a UserError that names `flag` and `path`, which cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{flag} = "{path}" cannot be written: {error.strerror}; take another.') from error


def check_output(path: str | pathlib.Path, flag: str, *suffixes: str) -> None:
    """Makes the directory of an output file, before the work that fills the file.

    Raises UserError if `path` ends in none of `suffixes`, is a directory or a device, or cannot be written.
    """
    if suffixes and not str(path).endswith(suffixes):
        raise UserError(f'{flag} = "{path}" must end in {" or ".join(suffixes)}.')
    path = pathlib.Path(path)
    with writing(path, flag):
        if path.exists() and not path.is_file():
            raise UserError(f'{flag} = "{path}" is no file, and cannot become one; take another.')
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(path)


def check_directory(path: str | pathlib.Path, flag: str) -> None:
    """Raises UserError unless files can be written in the directory `path`, or where it would be made."""
    path = pathlib.Path(path).absolute()
    with writing(path, flag):
        _try_to_write(next(folder for folder in (path, *path.parents) if folder.exists()) / "test")


def _try_to_write(path: pathlib.Path) -> None:
    """Raises OSError if no file can be written beside `path`."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text("\n")
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | pathlib.Path, form: Any, fix: str) -> Any:
    """The content of a JSON file.

    Args:
      path: the file.
      form: what the content must be: a type; a number, which it must equal; {key: form}, an object with these keys and
        perhaps others; [form], a list of such entries; or (form,), that or null.
      fix: what the user should do if the file is damaged.

    Raises:
      UserError: the file is missing, no regular file, not readable, no JSON, or not of this form.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("not a regular file")
        content = json.loads(pathlib.Path(path).read_text())
        _check_form(content, form, "the whole")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'"{path}" cannot be read ({getattr(error, "strerror", None) or error}); {fix}.') from error
    return content


def _check_form(content: Any, form: Any, name: str) -> None:
    if isinstance(form, tuple):
        (form,) = form
        if content is None:
            return
    kind = type(form) if isinstance(form, dict | list | int | float) else form
    if not isinstance(content, kind):
        raise ValueError(f"{name} is of type {type(content).__name__}")
    if isinstance(form, int | float) and content != form:
        raise ValueError(f"{name} is {content}, not {form}")
    if isinstance(form, list):
        for entry in content:
            _check_form(entry, form[0], f"an entry of {name}")
    elif isinstance(form, dict):
        for key, inner in form.items():
            if key not in content:
                raise ValueError(f'"{key}" is missing')
            _check_form(content[key], inner, f'"{key}"')
