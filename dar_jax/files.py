"""Places that users name, on a disk or in a bucket (gs://), and files that appear whole or not at all.

Everything that takes a workdir, data, weights or an output from a user goes through this module. A local place is a
`pathlib.Path`. A place in a bucket is an `etils.epath.Path`, which has the same methods and works by gcsfs.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from dar_jax.errors import UserError

# epath, also orbax's, reads this at its first use. Otherwise it takes the file system of tensorflow, where that is.
os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs reads this at its import. Otherwise it asks whether a bucket is zonal, for which it needs more permissions.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Path = pathlib.PurePath  # what `path` returns is one, and has the methods of pathlib.Path
CACHE = pathlib.Path("~/.cache/dar_jax/gs")  # copies of what libraries can read from a local file only
PUSH_SECONDS = 30  # between two copies of the logs to a bucket
REPORT_SECONDS = 15  # between two lines about copies
SEAL = "crc32"  # the key of the checksum in a JSON object
_THREADS = 8  # files that are copied at the same time


def is_remote(location: str | os.PathLike) -> bool:
    """Whether `location` is in a bucket."""
    return os.fspath(location).startswith("gs://")


def path(location: str | os.PathLike) -> Path:
    """The absolute path of a location that a user gave: pathlib's, or epath's for gs://bucket/name.

    Raises UserError for other schemes, without a bucket, or if gcsfs is not installed.
    """
    text = os.fspath(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) and not re.match("gs://[a-z0-9]", text):
        raise UserError(f'"{text}" is neither a local path nor gs://BUCKET/NAME; name one of them.')
    if not is_remote(text):
        return pathlib.Path(text).absolute()
    _filesystem()
    from etils import epath

    return epath.Path(text)


def _filesystem():
    """The gcsfs file system of this process, without a cache of listings, which other hosts change."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError('gs:// needs gcsfs; install it with pip install "dar_jax[gcs]" (here: -e ".[gcs]").')
    import fsspec

    fsspec.config.conf["gs"] = {"use_listings_cache": False}  # also for the instance that epath makes
    return fsspec.filesystem("gs")


def failure(error: BaseException | None) -> str | None:
    """What Google's storage, or the way to it, refused; None if `error` and its causes are of something else."""
    while error:
        if isinstance(error, FileNotFoundError) and (bucket := re.search("(?:^|/)b/([^/]+)(?:/o)?$", str(error))):
            return f"there is no bucket {bucket[1]}"
        if type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests"):
            return str(error) or type(error).__name__
        if re.search("Forbidden: |http_response_code|Error (reading|writing|deleting|listing).* gs://", str(error)):
            return str(error).split(" [")[0]  # tensorstore adds its whole configuration
        error = error.__cause__ or error.__context__
    return None


def why(error: Exception) -> str | None:
    """Why a disk or a bucket cannot be written or read; None if `error` is of something else."""
    return error.strerror if isinstance(error, OSError) and error.strerror else failure(error)


@contextlib.contextmanager
def replacing(location: str | os.PathLike, *, only_writer: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary local path. The file written there takes the place of `location` when the block ends.

    If the block raises, `location` stays as it was and the temporary file is removed. Several processes may write at
    once. The temporary name of an `only_writer` is always the same, so that killed processes leave one such file at
    most.
    """
    target = path(location)
    if is_remote(target):
        with tempfile.TemporaryDirectory() as directory:
            temporary = pathlib.Path(directory, target.name)
            yield temporary
            _filesystem().put_file(str(temporary), str(target))
        return
    temporary = target.with_name(f"{target.name}.tmp" if only_writer else f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(location)  # a full disk has no name of its own
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_text(location: str | os.PathLike) -> str:
    """The content of a text file; bytes that are no UTF-8 are replaced."""
    return path(location).read_bytes().decode(errors="replace")


def write_text(location: str | os.PathLike, text: str) -> None:
    """Writes a text file through `replacing`."""
    with replacing(location) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create(location: str | os.PathLike, text: str) -> bool:
    """Makes a text file, unless there is one. Returns whether it did.

    Of several callers, each with a text of its own, one makes it.
    """
    target = path(location)
    try:
        if is_remote(target):
            _filesystem().pipe_file(str(target), text.encode(), mode="create")
        else:
            _create_local(target, text)
    except FileExistsError:
        # An answer may have been lost and the request repeated, so that it met its own file.
        return is_remote(target) and target.read_text() == text
    return True


def _create_local(target: pathlib.Path, text: str) -> None:
    """`create` on a disk: nobody sees the file without its text."""
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(target, "x", encoding="utf-8") as file:
                file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(location: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    """Writes `content` as JSON and a line end through `replacing`."""
    write_text(location, json.dumps(content, indent=indent) + "\n")


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` and its checksum, as the files hold it that dar_jax reads again."""
    return {**content, SEAL: zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def unseal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` without its checksum, which may be missing. Raises ValueError if it differs, or its name is damaged."""
    name = SEAL if SEAL in content else next(reversed(content), None)  # its place is the last
    rest = {key: value for key, value in content.items() if key != name}
    is_sealed = name is not None and content[name] == seal(rest)[SEAL]
    if SEAL in content and not is_sealed:
        raise ValueError(f'its checksum differs; if it was changed on purpose, remove "{SEAL}"')
    if SEAL not in content and is_sealed:
        raise ValueError(f'"{name}" must be "{SEAL}"')
    return rest if is_sealed else content


def sha256(location: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    source = path(location)
    if not is_remote(source) and source.exists() and not source.is_file():  # a pipe would be waited for
        raise IsADirectoryError(errno.EISDIR, "no regular file", str(source))
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: Iterable[str | os.PathLike]) -> list[str]:
    """`sha256` of each file, eight files at a time."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter
        return list(pool.map(sha256, paths))


def sizes(directory: str | os.PathLike) -> dict[str, int]:
    """The size in bytes of every file of a directory, by its name; {} if there is no such directory."""
    try:
        if is_remote(directory):
            entries = _filesystem().ls(str(directory), detail=True)
            return {entry["name"].rsplit("/", 1)[1]: entry["size"] for entry in entries if entry["type"] == "file"}
        with os.scandir(directory) as found:
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
    except FileNotFoundError:
        return {}


def names(directory: str | os.PathLike) -> list[str]:
    """The files of a directory and of all below it, by their names relative to it, in order."""
    directory = path(directory)
    if is_remote(directory):
        whole = str(directory).removeprefix("gs://").rstrip("/") + "/"
        return sorted(name.removeprefix(whole) for name in _filesystem().find(str(directory)))
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())


def remove_tree(directory: str | os.PathLike) -> None:
    """Removes a directory with all that is in it."""
    directory = path(directory)
    if is_remote(directory):
        directory.rmtree()
    else:
        shutil.rmtree(directory)


def local(location: str | os.PathLike) -> pathlib.Path:
    """A local file with the content of `location`, for libraries that read no other: `location` itself, or a copy.

    Copies are kept in `CACHE` under the generation that the bucket gives to a content, so that they never grow old. If
    there is no such file in the bucket, there is none at the path returned.
    """
    source = path(location)
    if not is_remote(source):
        return source
    try:
        generation = _filesystem().info(str(source)).get("generation")
    except FileNotFoundError:
        generation = None
    key = hashlib.sha256(f"{source} {generation}".encode()).hexdigest()
    copy = CACHE.expanduser() / key[:16] / source.name
    if generation is not None:
        fetch(source.parent, {source.name: None}, copy.parent)
    return copy


def fetch(source: Path, sums: dict[str, str | None], directory: pathlib.Path) -> None:
    """Copies files of the remote directory `source` to `directory`, once for all processes of this host.

    Args:
      source: the remote directory.
      sums: SHA-256 by the name of each file, None for a file that is not to be checked.
      directory: a local one, made if it is missing. Files that are there already are not copied again.

    Raises:
      UserError: what arrived does not have its checksum.
    """
    with writing(directory, "the cache"):
        directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this host may be copying the same files
        todo = [name for name in sums if not (directory / name).exists()]

        def copy(name: str) -> None:
            with replacing(directory / name, only_writer=True) as temporary:
                _filesystem().get_file(str(source / name), str(temporary))
                if sums[name] not in (None, sha256(temporary)):
                    raise UserError(f'"{source / name}" is damaged (checksum); copy it again, or make it again.')

        reported = time.monotonic()
        copies = [pool.submit(copy, name) for name in todo]
        for count, done in enumerate(concurrent.futures.as_completed(copies), start=1):
            done.result()
            if count == len(todo) or time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                print(f"copied {count} of {len(todo)} files from {source} to {directory}", flush=True)


class Mirror:
    """A local directory whose files are copied to `location`, for writers that append; `location` itself, if local.

    Attributes:
      directory: where to write.
    """

    def __init__(self, location: str | os.PathLike):
        self.directory = self._target = path(location)
        self._pool, self._pushed, self._last = None, {}, time.monotonic()
        if is_remote(self._target):
            self.directory = pathlib.Path(tempfile.mkdtemp(prefix="dar_jax_"))
            self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def push_sometimes(self) -> None:
        """Starts to copy what is new, unless that was done within `PUSH_SECONDS`, and does not wait for it."""
        if self._pool and time.monotonic() - self._last > PUSH_SECONDS:
            self._last = time.monotonic()
            self._pool.submit(self._push)  # what fails here is copied again by the next call

    def push(self) -> None:
        """Returns when all is copied; raises the error if it cannot be."""
        if self._pool:
            self._pool.submit(self._push).result()

    def close(self) -> None:
        """Copies what is new and removes the local directory, if `location` is remote."""
        if self._pool:
            self.push()
            self._pool.shutdown()
            shutil.rmtree(self.directory)

    def _push(self) -> None:
        for file in sorted(self.directory.rglob("*")):
            if file.is_file() and self._pushed.get(file) != (size := file.stat().st_size):
                content = file.read_bytes()[:size]  # a whole number of appends, as of now
                _filesystem().pipe_file(str(self._target / file.relative_to(self.directory).as_posix()), content)
                self._pushed[file] = size


@contextlib.contextmanager
def writing(location: str | os.PathLike, flag: str) -> Iterator[None]:
    """Makes an error of the disk or the bucket within the block a UserError that names `flag` and `location`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = why(error)
        if reason is None:
            raise
        raise UserError(f'{flag} = "{location}" cannot be written: {reason}; take another.') from error


def check_output(location: str | os.PathLike, flag: str, *suffixes: str) -> None:
    """Makes the directory of an output file, before the work that fills the file.

    Raises UserError if `location` ends in none of `suffixes`, is a directory or a device, or cannot be written.
    """
    if suffixes and not str(location).endswith(suffixes):
        raise UserError(f'{flag} = "{location}" must end in {" or ".join(suffixes)}.')
    with writing(location, flag):
        output = path(location)
        if not is_remote(output):  # directories of a bucket need not be made
            if output.exists() and not output.is_file():
                raise UserError(f'{flag} = "{location}" is no file, and cannot become one; take another.')
            output.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(output)


def check_directory(location: str | os.PathLike, flag: str) -> None:
    """Raises UserError unless files can be written in the directory `location`, or where it would be made."""
    with writing(location, flag):
        directory = path(location)
        if not is_remote(directory):
            directory = next(folder for folder in (directory, *directory.parents) if folder.exists())
        _try_to_write(directory / "test")


def _try_to_write(output: Path) -> None:
    """Raises OSError, or an error of the bucket, if no file can be written beside `output`."""
    temporary = output.with_name(f"{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text("\n")
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def read_json(location: str | os.PathLike, form: Any, fix: str) -> Any:
    """The content of a JSON file.

    Args:
      location: the file.
      form: what the content must be: a type; a number, which it must equal; {key: form}, an object with these keys and
        perhaps others; [form], a list of such entries; or (form,), that or null.
      fix: what the user should do if the file is damaged.

    Raises:
      UserError: the file is missing, no regular file, not readable, no JSON, not of this form, or not as it was sealed.
    """
    try:
        file = path(location)
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("not a regular file")
        content = json.loads(file.read_text())
        content = unseal(content) if isinstance(content, dict) else content
        _check_form(content, form, "the whole")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'"{location}" cannot be read ({getattr(error, "strerror", None) or error}); {fix}.') from error
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
