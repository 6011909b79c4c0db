"""Writes prepared data (`data.latents`): each image decoded, cropped and encoded once, in shards that survive a kill.

A shard depends on its own source images alone, and so does not on when, where or beside which others it was made. It
is written under a temporary name, renamed, and recorded in progress/; one that is recorded is never written again.
Workers share the shards by their numbers and need not know of each other: who finds all recorded writes the manifest.
"""

import base64
import contextlib
import errno
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dar_jax import files, lock
from dar_jax.data.buckets import Size, nearest, parse_buckets
from dar_jax.data.images import center_crop, to_channels
from dar_jax.data.latents import SCHEMA, SHARD, LatentSource, bucket_dtypes, check_checksums, read_manifest
from dar_jax.data.sources import Source, read
from dar_jax.errors import UserError, require
from dar_jax.pretrained.qwen_text import EMPTY_PROMPT

if TYPE_CHECKING:
    from dar_jax.pretrained.qwen_text import TextEncoder
    from dar_jax.pretrained.vae import Vae

# One record a chunk, for random access; not compressed, because latents hardly can be and it takes time to undo.
_OPTIONS = "group_size:1,uncompressed"
_BATCH = 64  # images at a time without a VAE
_REPORT_SECONDS = 30


def describe(
    source: Source, name: str, split: str, image_size: int, vae: "Vae | None", dtype: str, keep_image: bool,
    shard_size: int, text_encoder: "TextEncoder | None" = None, buckets: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The part of a manifest that is known before the first image: what two runs must share to continue each other.

    Args:
      source: the images.
      name: of the source, as in "tfds:imagenet2012".
      split: of the source.
      image_size: S, height = width after the crop.
      vae: makes the moments, or None to keep pixels only.
      dtype: of the moments and of the embeddings, float16 or float32.
      keep_image: whether to keep the pixels beside the moments.
      shard_size: source images per shard.
      text_encoder: makes the embeddings of the captions, or None to keep the captions alone, if there are any.
      buckets: sizes of the crops in place of image_size, as "448x576".

    Raises:
      UserError: image_size or a bucket cannot be encoded, there are no images, or no captions to encode.
    """
    if not len(source):
        raise UserError(f'"{name}" has no images in split "{split}".')
    fields, numpy_dtype, text = [["label", "<i4", []]], {"float16": "<f2", "float32": "<f4"}[dtype], None
    has_captions = getattr(source, "has_captions", False)
    if text_encoder:
        require(has_captions, f'--text_encoder: the images of "{name}" have no captions; leave it out.')
        fields.append(["tokens", "<i4", []])
        text = {"encoder": text_encoder.fingerprint, "size": text_encoder.size, "dtype": numpy_dtype}
    sizes = {
        f"--buckets: {name}": size for name, size in zip(buckets, parse_buckets(buckets, "--buckets"), strict=True)
    }
    if vae:
        for place, size in {f"--image_size = {image_size}": (image_size,), **sizes}.items():
            if any(side % vae.model.factor for side in size):
                raise UserError(f"{place} must be divisible by {vae.model.factor}, as the VAE asks.")
        side = image_size // vae.model.factor
        shape = [2, 2, side, side, vae.model.latent_channels]
        fields.append(["moments", numpy_dtype, shape])
    if keep_image or not vae:
        fields.append(["image", "|u1", [image_size, image_size, 3]])
    return {
        "schema": SCHEMA,
        "source": name,
        "split": split,
        "num_source": len(source),
        "num_classes": source.num_classes,
        "image_size": image_size,
        "crop": "adm",
        "vae": vae and vae.describe(),
        "fields": fields,
        "shard_size": shard_size,
        **({"buckets": list(buckets)} if buckets else {}),
        **({"captions": True} if has_captions else {}),
        **({"text": text} if text else {}),
    }


def prepare(
    source: Source, settings: dict[str, Any], vae: "Vae | None", out: str, *, max_skipped: int, worker: int,
    workers: int, say: Callable[[str], None], text_encoder: "TextEncoder | None" = None,
) -> None:  # fmt: skip
    """Writes the shards worker, worker + workers, ... that are not there yet; the last worker, the manifest.

    Args:
      source: the images.
      settings: of `describe`.
      vae, text_encoder: as there.
      out: the directory.
      max_skipped: how many images that cannot be read a worker reports and leaves out.
      worker: 0 <= worker < workers.
      workers: how many processes share the work; also hosts that share a file system.
      say: takes lines of progress.

    Raises:
      UserError: `out` holds another set or cannot be written, more than max_skipped images cannot be read, or all, or
        the VAE or the text encoder gives a number that the dtype cannot hold.
    """
    directory = files.path(out)
    with files.writing(out, "--out"):
        _claim(directory, settings)
    count = -(-settings["num_source"] // settings["shard_size"])
    names = [f"shard-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    if (directory / "manifest.json").exists():
        read_manifest(directory)
        say(f"{out} is finished; --verify checks it")
        return
    mine = range(worker, count, workers)
    sizes = files.sizes(directory)
    done = {i: entry for i in mine if (entry := _finished(directory, names[i], sizes))}
    todo = [i for i in mine if i not in done]
    say(f"{len(mine)} shards to write, {len(done)} of them are finished")
    if todo:
        progress = _Progress(todo, settings, say, max_skipped, sum(len(entry["skipped"]) for entry in done.values()))
        encoders = _Encoders(*(_make_encode(vae) if vae else (None, _BATCH)), text_encoder)
        with files.writing(out, "--out"), _naming_full_disks(), ThreadPoolExecutor(os.cpu_count()) as pool:
            for i in todo:
                with lock.holding(
                    directory / "progress" / f"{names[i]}.lock",
                    f'shard {i} of --out = "{out}"',
                    "give each worker another number with --worker=i/n, or wait",
                ):
                    _write_shard(directory, names[i], i, source, settings, encoders, pool, progress)
    sizes = files.sizes(directory)
    entries = [_finished(directory, name, sizes) for name in names]
    if missing := entries.count(None):
        say(f"{missing} shards of other workers are not finished; the last of them writes the manifest")
        return
    manifest = {
        **settings,
        "num_examples": sum(entry["records"] for entry in entries),
        "skipped": [line for entry in entries for line in entry.pop("skipped")],
        "shards": entries,
    }
    if text_encoder:
        (empty,) = _in_dtype(text_encoder.encode([EMPTY_PROMPT]), settings["text"]["dtype"], "the empty prompt")
        manifest["empty"] = base64.b64encode(empty.tobytes()).decode()
    if not manifest["num_examples"]:
        raise UserError(f"none of the {manifest['num_source']} images could be read: {manifest['skipped'][0]}")
    files.write_json(directory / "manifest.json", files.seal(manifest), indent=1)
    size = sum(entry["bytes"] for entry in entries)
    say(
        f"wrote {out}: {manifest['num_examples']:,} examples in {count} shards, {size / 1e9:.3g} GB, "
        f"{len(manifest['skipped'])} images skipped"
    )


@contextlib.contextmanager
def _naming_full_disks() -> Iterator[None]:
    """Makes an OSError of the RuntimeError with which ArrayRecord reports one."""
    try:
        yield
    except RuntimeError as error:
        if found := re.search(r"(?:write|close|open)\(\) failed: ([^;]*)", str(error)):
            raise OSError(errno.EIO, found[1]) from error
        raise


def verify(path: files.Path) -> dict[str, Any]:
    """Reads all of a prepared directory, and returns its manifest.

    Raises UserError unless every shard has the checksum and the number of records of the manifest, every record has all
    fields, and every label is a class.
    """
    check_checksums(path, read_manifest(path)["shards"])
    source = LatentSource(path)
    for index in range(len(source)):
        read(source, index)
    return source.manifest


class _Progress:
    """Counts the images of the shards that are to be written, and says how long the rest will take."""

    def __init__(self, todo: list[int], settings: dict, say: Callable[[str], None], max_skipped: int, skipped: int):
        size, total = settings["shard_size"], settings["num_source"]
        self.total = sum(min((i + 1) * size, total) - i * size for i in todo)
        self.say, self.max_skipped, self.skipped, self.count = say, max_skipped, skipped, 0
        self.start = self.reported = time.monotonic()

    def add(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        if now - self.reported > _REPORT_SECONDS or self.count == self.total:
            self.reported = now
            rate = self.count / max(now - self.start, 1e-9)
            hours, minutes = divmod(round((self.total - self.count) / rate / 60), 60)
            self.say(f"{self.count:,} of {self.total:,} images, {rate:.1f} images/s, {hours} h {minutes:02} min left")

    def skip(self, error: UserError) -> str:
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise UserError(f"{error} It is one more than --max_skipped = {self.max_skipped}.")
        self.say(f"skipped: {error}")
        return str(error)


def _claim(directory: files.Path, settings: dict[str, Any]) -> None:
    """Notes what is prepared in `directory`, or raises UserError if that is something else."""
    manifest, notes = directory / "manifest.json", directory / "progress" / "settings.json"
    if not manifest.exists() and not notes.exists():
        if (directory / "config.json").exists():
            raise UserError(f'--out = "{directory}" is the workdir of a run; take another.')
        notes.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(notes, files.seal(settings), indent=1)
    stored = files.read_json(manifest if manifest.exists() else notes, dict, "take another --out")
    for key, value in settings.items():
        if stored.get(key) != value:
            raise UserError(
                f'--out = "{directory}" holds data with {key} = {stored.get(key)}, not {value}; take another, or '
                "repeat the command it was begun with."
            )


def _finished(directory: files.Path, name: str, sizes: dict[str, int]) -> dict[str, Any] | None:
    """What progress/ says of a shard, if it is whole and the shard is there in its full size."""
    try:
        entry = files.read_json(directory / "progress" / f"{name}.json", {**SHARD, "skipped": [str]}, "")
        return entry if sizes.get(name) == entry["bytes"] else None
    except (UserError, FileNotFoundError):
        return None


def _make_encode(vae: "Vae") -> tuple[Callable[[np.ndarray], Any], int]:
    """(images uint8 [B, S, S, 3] -> moments [B, 2 (image, mirror), 2, h, w, C] on all devices of this host, B)."""
    import jax

    from dar_jax import sharding
    from dar_jax.config import default
    from dar_jax.pretrained.vae import CHUNK, make_encoder

    mesh = sharding.make_mesh(default().mesh, jax.local_devices())
    encode = make_encoder(vae, mesh)
    return lambda images: (encode(images), encode(images[:, :, ::-1])), CHUNK * sharding.batch_shards(mesh)


def _in_dtype(arrays: Sequence[np.ndarray], dtype: str, name: str) -> list[np.ndarray]:
    """The arrays in `dtype`. Raises UserError, which says that they are of `name`, if it cannot hold them."""
    with np.errstate(over="ignore"):
        found = [np.asarray(array, dtype) for array in arrays]
    if not all(np.isfinite(array).all() for array in found):
        raise UserError(
            f"an encoder gives values for {name} that are no numbers of {np.dtype(dtype)}; if that is float16, set "
            "--dtype=float32."
        )
    return found


class _Encoders(NamedTuple):
    images: Callable[[np.ndarray], Any] | None
    batch_size: int
    texts: "TextEncoder | None"


def _write_shard(directory, name, number, source, settings, encoders, pool, progress) -> None:
    size = settings["shard_size"]
    indices = range(number * size, min((number + 1) * size, settings["num_source"]))
    skipped, tokens, records = [], [], []
    with files.replacing(directory / name, only_writer=True) as temporary:
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)

        def write(dtype: np.dtype, examples: list[dict], images: np.ndarray, moments: Any) -> None:
            batch, rest = np.zeros(len(examples), dtype), [b""] * len(examples)
            batch["label"] = [example["label"] for example in examples]
            if "image" in dtype.names:
                batch["image"] = images[: len(examples)]
            if moments is not None:
                moments = np.stack(moments, axis=1)[: len(examples)]
                (batch["moments"],) = _in_dtype([moments], dtype["moments"].base, name)
            if settings.get("captions"):
                captions = [example["caption"] for example in examples]
                rest = [caption.encode() for caption in captions]
            if encoders.texts:
                texts = _in_dtype(encoders.texts.encode(captions), settings["text"]["dtype"], name)
                batch["tokens"] = [len(text) for text in texts]
                tokens.extend(map(len, texts))
                rest = [text.tobytes() + caption for text, caption in zip(texts, rest, strict=True)]
            for record, more in zip(batch, rest, strict=True):
                writer.write(record.tobytes() + more)

        pending = None  # a batch on its way through the devices
        try:
            for dtype, size, members in _in_buckets(source, indices, settings, pool):
                records.append(0)
                for examples, images, errors in _batches(source, members, size, encoders.batch_size, pool):
                    skipped += [progress.skip(error) for error in errors]
                    # Dispatched before the batch before is fetched, so that the devices need not wait for the disk.
                    moments = encoders.images(images) if encoders.images and examples else None
                    following = dtype, examples, images, moments
                    if pending:
                        write(*pending)
                    pending, records[-1] = following, records[-1] + len(examples)
                    progress.add(len(examples) + len(errors))
            write(*pending)
        finally:
            writer.close()
        entry = {
            "name": name,
            "records": sum(records),
            "bytes": temporary.stat().st_size,
            "sha256": files.sha256(temporary),
            "skipped": skipped,
            **({"tokens": tokens} if encoders.texts else {}),
            **({"buckets": records} if "buckets" in settings else {}),
        }
    files.write_json(directory / "progress" / f"{name}.json", files.seal(entry), indent=1)


def _in_buckets(
    source: Source, indices: range, settings: dict[str, Any], pool: ThreadPoolExecutor
) -> Iterator[tuple[np.dtype, Size, Sequence[int]]]:
    """Yields for each bucket, or for the one square, its record, its size and those of `indices` that go there.

    Images whose head is damaged go to the first; there they are found to be damaged.
    """
    buckets, dtypes = parse_buckets(settings.get("buckets", ()), "buckets"), bucket_dtypes(settings)
    if not buckets:
        yield dtypes[0], (settings["image_size"],) * 2, indices
        return

    def size_of(index: int) -> Size:
        with contextlib.suppress(UserError):
            return source.image_size(index)
        return buckets[0]

    numbers = nearest(np.array(list(pool.map(size_of, indices))), buckets)
    for number, (dtype, size) in enumerate(zip(dtypes, buckets, strict=True)):
        yield dtype, size, [index for index, found in zip(indices, numbers, strict=True) if found == number]


def _batches(
    source: Source, indices: Sequence[int], size: Size, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, list[UserError]]]:
    """Yields examples without images, crops of their images, and errors.

    The crops are uint8 [batch_size, *size, 3], of which zeros follow the last.
    """

    def load(index: int) -> tuple[dict[str, Any], np.ndarray] | UserError:
        try:
            example = read(source, index)
        except UserError as error:
            return error
        image = center_crop(to_channels(example.pop("image"), 3), size)
        return example, image

    ahead: deque[Future] = deque()
    for start in range(0, len(indices) + 2 * batch_size, batch_size):  # the pool works two batches ahead
        ahead.extend(pool.submit(load, index) for index in indices[start : start + batch_size])
        if start < 2 * batch_size:
            continue
        examples, images, errors = [], np.zeros((batch_size, *size, 3), np.uint8), []
        for _ in range(min(batch_size, len(ahead))):
            loaded = ahead.popleft().result()
            if isinstance(loaded, UserError):
                errors.append(loaded)
            else:
                images[len(examples)] = loaded[1]
                examples.append(loaded[0])
        yield examples, images, errors
