"""Prepared data: few large ArrayRecord shards and the manifest that describes them. `dar_jax.prepare` writes them.

A record is one example, its fields one after the other, little-endian and without padding:

    label    int32
    moments  float16 or float32 [2, 2, h, w, C]: of the image, of its mirror; each mean and deviation, not normalised
    image    uint8 [S, S, 3]: after the crop

with moments if a VAE made them, and with the image if asked for or if there is no VAE. In data with captions the
fields are followed by

    text     float16 or float32 [tokens, E]: the embedding of the caption, without padding, if an encoder made it
    caption  UTF-8, to the end of the record

and one field more, tokens int32, says how many tokens the text has. So a record is as long as its caption asks for: the
512 tokens that a caption of Qwen-Image may have, in float16 and 3,584 features each, would take 3.7 MB in every record.

Images prepared in buckets have H and W in place of S, and h and w accordingly; the records of a shard are in the order
of the buckets.

manifest.json lists the fields (numpy's names and shapes, in this order, of a square of image_size) and

    schema        SCHEMA; another one is another layout
    source, split, num_source, num_classes   what was prepared, and how many images and classes it had
    image_size, crop                         S; "adm": `images.center_crop`
    vae           null, or the fingerprint, scale and, unless it is 0, shift of the VAE (`vae.Vae.describe`)
    buckets       with buckets: their sizes, as "448x576"
    captions      true, if there are captions
    text          with embeddings: the fingerprint of the text encoder ("encoder"), E ("size") and their dtype
    empty         with embeddings: that of the empty prompt, as text in a record, in base64
    shard_size    source images per shard: shard i is made of images i * shard_size to (i + 1) * shard_size
    num_examples, skipped                    how many records there are; what was wrong with the other images
    shards        name, records, bytes and sha256 of every file, in order; with embeddings the tokens of each record;
                  with buckets how many records each has
    crc32         of all this, `files.seal`
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from dar_jax import files
from dar_jax.data.buckets import parse_buckets
from dar_jax.data.texts import Texts
from dar_jax.errors import UserError

SCHEMA = 1
AGAIN = "copy it again, or prepare the data again"  # what helps against any damage
# What a reader needs of a manifest: keys and the forms of their values (`files.read_json`).
SHARD = {"name": str, "records": int, "bytes": int, "sha256": str}
MANIFEST = {
    "schema": SCHEMA,
    "num_classes": int,
    "num_source": int,
    "num_examples": int,
    "skipped": list,
    "fields": [list],
    "vae": ({"fingerprint": str, "scale": int | float | list},),
    "shards": [SHARD],
}


def record_dtype(fields: Iterable[tuple[str, str, Iterable[int]]]) -> np.dtype:
    """The record as a numpy structure, of fields (name, dtype, shape)."""
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def bucket_dtypes(settings: dict[str, Any]) -> list[np.dtype]:
    """The records of a manifest's buckets, or the one record if it has none."""
    fields, square = settings["fields"], settings["image_size"]
    if "buckets" not in settings:
        return [record_dtype(fields)]
    found = []
    for size in parse_buckets(settings["buckets"], "buckets"):
        shapes = {
            "image": lambda shape, size=size: (*size, 3),
            "moments": lambda shape, size=size: (2, 2, *(shape[2] * side // square for side in size), shape[4]),
        }
        found.append(record_dtype((name, kind, shapes.get(name, tuple)(shape)) for name, kind, shape in fields))
    return found


def read_manifest(path: files.Path) -> dict[str, Any]:
    """The manifest of the directory `path`.

    Raises UserError unless the set is finished, its manifest of this schema, and every shard there in its full size.
    """
    if not (path / "manifest.json").exists():
        state = "is unfinished; repeat its" if (path / "progress").exists() else "holds no manifest.json; make it with"
        raise UserError(f'prepared data "{path}" {state} python -m dar_jax.prepare --out={path}.')
    manifest = files.read_json(path / "manifest.json", MANIFEST, AGAIN)
    counts = {
        "num_examples": sum(shard["records"] for shard in manifest["shards"]),
        "num_source": manifest["num_examples"] + len(manifest["skipped"]),
    }
    for key, found in counts.items():
        if manifest[key] != found:
            raise UserError(
                f'"{path}/manifest.json" has {key} = {manifest[key]}, but its shards make {found}; {AGAIN}.'
            )
    sizes = files.sizes(path)
    for shard in manifest["shards"]:
        file, size = path / shard["name"], sizes.get(shard["name"])
        if not re.fullmatch(r"\w[\w.-]*", shard["name"]):
            raise UserError(f'"{path}/manifest.json" names "{shard["name"]}", which is no file of its folder; {AGAIN}.')
        if size is None:
            raise UserError(f'shard "{file}" is missing; {AGAIN}.')
        if size != shard["bytes"]:
            raise UserError(f'shard "{file}" has {size} bytes, not the {shard["bytes"]} of its manifest; {AGAIN}.')
    return manifest


def check_checksums(path: files.Path, shards: list[dict[str, Any]]) -> None:
    """Reads `shards`, entries of the manifest, as a whole; raises UserError that names those that are damaged."""
    sums = files.checksums([path / shard["name"] for shard in shards])
    bad = [shard["name"] for shard, found in zip(shards, sums, strict=True) if found != shard["sha256"]]
    if bad:
        raise UserError(
            f'{len(bad)} of {len(shards)} shards of "{path}" are damaged (checksum): {", ".join(bad)}; copy them '
            "again, or prepare the data again."
        )


def _local(path: files.Path, manifest: dict[str, Any]) -> files.Path:
    """`path`, or for one in a bucket, which ArrayRecord does not read, a copy in the cache of this host."""
    if not files.is_remote(path):
        return path
    sums = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    directory = files.CACHE.expanduser() / digest[:16]
    files.fetch(path, sums, directory)
    return directory


def _check_count(path: files.Path, shard: dict[str, Any]) -> None:
    """Raises UserError unless a shard can be opened and has as many records as its entry of the manifest says."""
    try:
        with contextlib.closing(ArrayRecordReader(str(path / shard["name"]))) as reader:
            found = reader.num_records()
    except RuntimeError as error:
        raise UserError(f'shard "{path}/{shard["name"]}" is damaged ({error}); {AGAIN}.') from error
    if found != shard["records"]:
        raise UserError(f'shard "{path}/{shard["name"]}" has {found} records, not {shard["records"]}; {AGAIN}.')


class LatentSource:
    """The records of a prepared directory, in the order of its source; a `sources.Source`.

    Attributes:
      path: the directory.
      directory: a local one with the same shards; a copy, if `path` is in a bucket.
      manifest: its manifest.
      dtype: the record; with buckets, that of the first.
      buckets: their sizes as config.data.buckets has them, () without.
      groups: the number of each record's bucket, int [N].
      shift, scale: a latent is (z - shift) * scale; float32, numbers or one for each channel. None without a VAE.
      texts: what is known of the embeddings of captions, None without.
    """

    def __init__(self, path: files.Path):
        self.path, self.manifest = path, read_manifest(path)
        self.directory = _local(path, self.manifest)
        self.num_classes, vae = self.manifest["num_classes"], self.manifest["vae"]
        self.shift = self.scale = None
        try:
            self.dtypes, shards = bucket_dtypes(self.manifest), self.manifest["shards"]
            self.dtype, self.buckets = self.dtypes[0], tuple(self.manifest.get("buckets", ()))
            counts = [shard["buckets"] if self.buckets else [shard["records"]] for shard in shards]
            self.groups = np.concatenate([np.repeat(np.arange(len(self.dtypes)), count) for count in counts])
            if len(self.groups) != self.manifest["num_examples"]:
                raise ValueError(f"{len(self.groups)} examples in buckets")
            if "label" not in self.dtype.names or ("moments" in self.dtype.names) != bool(vae):
                raise ValueError(f"fields {', '.join(self.dtype.names)}")
            if vae:
                self.shift, self.scale = self._scaling(vae)
            self._has_captions, self._text = self.manifest.get("captions", False), self.manifest.get("text")
            self.texts = self._text and self._read_texts()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'"{path}/manifest.json" cannot be read ({error}); {AGAIN}.') from error
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda shard: _check_count(self.directory, shard), self.manifest["shards"]))
        self.records = ArrayRecordDataSource([str(self.directory / shard["name"]) for shard in self.manifest["shards"]])

    def _scaling(self, vae: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale of the manifest's VAE. Raises TypeError or ValueError if they are not such."""
        shift, scale = (np.asarray(value, np.float32) for value in (vae.get("shift", 0.0), vae["scale"]))
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"scale {vae['scale']}")
        if not np.isfinite(shift).all():
            raise ValueError(f"shift {vae['shift']}")
        channels = self.dtype["moments"].shape[-1]
        if any(value.shape not in ((), (channels,)) for value in (shift, scale)):
            raise ValueError(f"shift or scale are not of {channels} channels")
        return shift, scale

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"label": int} with "moments", "image", "text" and "caption", as the record has them.

        Raises UserError if the record is damaged.
        """
        try:
            content, dtype = self.records[index], self.dtypes[self.groups[index]]
            head = content[: dtype.itemsize] if self._has_captions else content
            (record,) = np.frombuffer(head, dtype)
            example = {name: record[name] for name in dtype.names if name != "tokens"}
            example["label"] = int(record["label"])
            rest = content[len(head) :]
            if self._text:
                text = np.frombuffer(rest, self._text["dtype"], int(record["tokens"]) * self._text["size"])
                example["text"], rest = text.reshape(-1, self._text["size"]), rest[text.nbytes :]
            return {**example, "caption": rest.decode()} if self._has_captions else example
        except (RuntimeError, ValueError) as error:
            raise UserError(f'record {index} of "{self.path}" is damaged ({error}); {AGAIN}.') from error

    @functools.cached_property
    def captions(self) -> list[str] | None:
        """The captions, or None. To gather them reads all records."""
        return [self[index]["caption"] for index in range(len(self))] if self._has_captions else None

    def _read_texts(self) -> Texts:
        size, empty = self._text["size"], base64.b64decode(self.manifest["empty"], validate=True)
        lengths = np.array([count for shard in self.manifest["shards"] for count in shard["tokens"]], np.int32)
        if "tokens" not in self.dtype.names or len(lengths) != self.manifest["num_examples"]:
            raise ValueError(f"tokens of {len(lengths)} texts")
        return Texts(self._text["encoder"], size, lengths, np.frombuffer(empty, self._text["dtype"]).reshape(-1, size))

    def check(
        self,
        space: str,
        image_size: int,
        channels: int,
        vae_fingerprint: str | None,
        buckets: tuple[str, ...] | None = None,
    ) -> None:
        """Raises UserError unless a model of these inputs, and of this VAE, if there is one, can learn from here.

        The buckets must be those of the records, unless None.
        """
        if buckets not in (None, self.buckets):
            raise UserError(
                f'config.data.buckets = {buckets}, but the records of "{self.path}" are prepared in {self.buckets}; '
                "set it to them. Diagnosis and config.eval.loss_images need data without buckets."
            )
        wanted = "image" if space == "pixels" else "moments"
        if wanted not in self.dtype.names:
            option = "--keep_images" if wanted == "image" else "--vae=DIR"
            raise UserError(
                f'config.model.space = {space} asks for {wanted}, but the records of "{self.path}" have only '
                f"{', '.join(self.dtype.names)}; prepare them with {option}."
            )
        moments = self.dtype["moments"].shape if wanted == "moments" else None
        sides = moments[2:4] if moments and self.buckets else (image_size, image_size)
        if moments not in (None, (2, 2, *sides, channels)):
            raise UserError(
                f"config.data.image_size = {image_size}, config.model.channels = {channels} do not suit the latents of "
                f'"{self.path}", which are {"x".join(map(str, moments[2:]))}.'
            )
        if wanted == "moments" and vae_fingerprint not in (None, self.manifest["vae"]["fingerprint"]):
            raise UserError(
                f'config.data.vae has the fingerprint {vae_fingerprint[:12]}, but the latents of "{self.path}" are of '
                f"{self.manifest['vae']['fingerprint'][:12]}; name the VAE that made them, or prepare them with this."
            )

    def check_patches(self, patch_size: int) -> None:
        """Raises UserError unless the latents of all buckets divide into patches."""
        for name, dtype in zip(self.buckets, self.dtypes, strict=False):
            sides = dtype["moments"].shape[2:4] if "moments" in dtype.names else (0,)
            if any(side % patch_size for side in sides):
                raise UserError(
                    f'the latents of bucket {name} of "{self.path}" have sides of {sides}, which config.model.'
                    f"patch_size = {patch_size} does not divide; prepare them in other --buckets."
                )

    def check_images(self, size: int) -> None:
        """Raises UserError unless the records have images of size * size pixels, whose features are needed."""
        if "image" not in self.dtype.names:
            raise UserError(
                f'config.repa.target needs images, but the records of "{self.path}" have only '
                f"{', '.join(self.dtype.names)}; prepare them with --keep_images."
            )
        if self.dtype["image"].shape != (size, size, 3):
            raise UserError(
                f'config.repa.target needs the images of the latents, {size}x{size}x3, but those of "{self.path}" are '
                f"{'x'.join(map(str, self.dtype['image'].shape))}; prepare the data again."
            )


def draw_latent(moments: np.ndarray, shift: np.ndarray, scale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(mean + std * noise - shift) * scale, float32 [h, w, C], of the moments [2, h, w, C] of one image.

    `shift` and `scale` are float32, [] or [C].
    """
    mean, std = moments.astype(np.float32)
    return (mean + std * rng.standard_normal(mean.shape, np.float32) - shift) * scale
