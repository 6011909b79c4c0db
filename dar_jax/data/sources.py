"""Random access to labelled or captioned images: digits, idx, folders, tensorflow-datasets, emoji, prepared latents.

`open_source` checks everything that can be wrong with a config before it reads an image.
"""

import functools
import gzip
import io
import math
import os
import zlib
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from dar_jax import files
from dar_jax.conditions import EMPTY_TOKENS, Embeddings, Kind
from dar_jax.data.caption_folder import open_caption_folder
from dar_jax.data.images import EXTENSIONS, decode_image, image_size
from dar_jax.data.texts import NO_TEXTS, Texts
from dar_jax.errors import UserError, check_choice, near_miss


class Source(Protocol):
    """Labelled images by index. Picklable, so that grain's worker processes can read it.

    Captioned sources also have `captions`, a string for each image, and those with embeddings of them `texts`
    (`texts.Texts`). Those of files or records say by `has_captions` whether there are any without reading them. Sources
    of images, not of latents, tell an image's height and width before it is decoded: `image_size(index)`.
    """

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [h, w, c] of any size, c = 1 or 3, "label": int}.

        With it comes "caption" of a captioned source, and "text" [n, size] of one with embeddings. Synthetic latents
        are float32 images; `latents.LatentSource` has "moments" instead, or too.
        """
        ...


class ArraySource:
    """Images held in memory: uint8 [N, h, w, c] and integer labels [N]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int):
        self.images, self.labels, self.num_classes = images, labels, num_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def image_size(self, index: int) -> tuple[int, int]:
        return self.images.shape[1:3]


class FolderSource:
    """Image files in one sub folder per class, decoded when asked for."""

    def __init__(self, root: str, classes: list[str], files: list[bytes], labels: list[int]):
        self.root, self.classes, self.num_classes = root, classes, len(classes)
        # Arrays, because a million Python strings are slow to pickle to every worker process.
        self.files, self.labels = np.array(files), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        return {"image": decode_image(path, path), "label": int(self.labels[index])}

    def image_size(self, index: int) -> tuple[int, int]:
        path = self._path(index)
        return image_size(path, path)

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.labels[index]], os.fsdecode(self.files[index]))


class TfdsSource:
    """Records of a prepared tensorflow-datasets set; without a class label every label is 0.

    Args:
      builder: of the set.
      split: of the set.

    Raises:
      NotImplementedError, ValueError: as `builder.as_data_source`.
    """

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        features = dict(builder.info.features.items())
        label, kinds = features.get("label"), tfds.features
        self.labelled = isinstance(label, kinds.ClassLabel)
        self.num_classes = label.num_classes if self.labelled else 1
        self.caption = next((key for key in ("caption", "text") if isinstance(features.get(key), kinds.Text)), None)
        self.has_captions = self.caption is not None
        # PIL decodes the bytes, as for folders: tfds's own decoder does not convert CMYK or palettes.
        self.records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = decode_image(io.BytesIO(record["image"]), self._name(index))
        example = {"image": image, "label": int(record["label"]) if self.labelled else 0}
        return {**example, "caption": record[self.caption].decode()} if self.caption else example

    def image_size(self, index: int) -> tuple[int, int]:
        return image_size(io.BytesIO(self.records[index]["image"]), self._name(index))

    def _name(self, index: int) -> str:
        return f"record {index} of {self.records.dataset_info.name}"

    @functools.cached_property
    def captions(self) -> list[str] | None:
        """The captions, or None. To gather them reads all records, but decodes no image."""
        return self.caption and [record[self.caption].decode() for record in self.records]


# Captions of one to eight words for synthetic examples.
_CAPTIONS = [" ".join(f"word{i * k % 97}" for k in range(1, 2 + i % 8)) for i in range(1000)]


class SyntheticSource:
    """Standard-normal latents, as many and of as many classes as ImageNet, with captions: to time a run without data.

    `with_texts` adds random embeddings; `texts` then says so.
    """

    num_classes = 1000

    def __init__(self, size: int, channels: int = 4, texts: Texts = NO_TEXTS):
        self.size, self.channels, self.texts = size, channels, texts

    @property
    def captions(self) -> list[str]:
        """A thousand captions in turn."""
        return (_CAPTIONS * (len(self) // len(_CAPTIONS) + 1))[: len(self)]

    def with_texts(self, size: int, length: int) -> "SyntheticSource":
        """The same with random embeddings of `size` features and up to `length` tokens."""
        rng = np.random.default_rng(0)
        empty = rng.standard_normal((min(EMPTY_TOKENS, length), size), np.float32)
        lengths = rng.integers(len(empty), length + 1, len(self), np.int32)
        return SyntheticSource(self.size, self.channels, Texts("", size, lengths, empty))

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        example = {"image": rng.standard_normal((self.size, self.size, self.channels), np.float32)}
        example |= {"label": index % 1000, "caption": _CAPTIONS[index % len(_CAPTIONS)]}
        if self.texts.size is not None:
            shape = self.texts.lengths[index], self.texts.size
            example["text"] = rng.standard_normal(shape, np.float32)
        return example


def _open_digits(split: str) -> Source:
    check_choice("split of digits", split, ("train", "test"))
    from sklearn.datasets import load_digits  # takes 2 s, which only this source should cost

    digits = load_digits()
    # The stored order cycles through the classes, so every fifth image would favour two of them.
    rank = np.zeros(len(digits.target), np.int64)  # position among the images of the same class
    for label in range(10):
        members = digits.target == label
        rank[members] = np.arange(members.sum())
    chosen = (rank % 5 == 4) == (split == "test")
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(images[..., None], digits.target[chosen], num_classes=10)


def _read_idx(path: str, ndim: int) -> np.ndarray:
    """Reads an idx file of uint8: bytes 0 0 8 ndim, big-endian uint32 sizes, data. Gzipped if named .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'idx file "{path}" cannot be read ({error}); fetch it again.') from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(
            f'idx file "{path}" starts with {list(content[:4])}, but uint8 data of {ndim} dimensions starts '
            f"with [0, 0, 8, {ndim}]; fetch it again."
        )
    shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
    if len(content) - header != math.prod(shape) or (shape[0] and 0 in shape):
        raise UserError(
            f'idx file "{path}" holds {len(content) - header} bytes of data, but its header announces '
            f"{shape}; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _open_idx(path: str, split: str) -> Source:
    check_choice("split of idx files", split, ("train", "test"))
    prefix = "train" if split == "train" else "t10k"
    found, missing = [], []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        candidates = (os.path.join(path, name), os.path.join(path, f"{name}.gz"))
        existing = [candidate for candidate in candidates if os.path.isfile(candidate)]
        found += existing[:1]
        missing += [] if existing else [f"{name}[.gz]"]
    if missing:
        raise UserError(
            f'config.data.path = "{path}" has no {" and no ".join(missing)}; name the directory of '
            "the idx files (`apt-get install dataset-fashion-mnist` fills /usr/share/datasets/fashion-mnist)."
        )
    images, labels = _read_idx(found[0], 3), _read_idx(found[1], 1)
    if len(images) != len(labels):
        raise UserError(
            f'idx file "{found[0]}" has {len(images)} images, but "{found[1]}" has {len(labels)} labels; '
            "fetch both again."
        )
    return ArraySource(images[..., None], labels, num_classes=int(labels.max(initial=0)) + 1)


def _subfolders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _subfolder(path: str, split: str) -> str:
    if not os.path.isdir(path):
        raise UserError(f'config.data.path = "{path}" is no directory; name the directory of the data.')
    root = os.path.join(path, split) if split not in ("", ".") else path
    if not os.path.isdir(root):
        raise UserError(
            f'split "{split}" is no sub folder of config.data.path = "{path}" (use "." if the data is directly in '
            f"it).{near_miss(split, _subfolders(path))}"
        )
    return root


def _open_folder(path: str, split: str) -> Source:
    root = _subfolder(path, split)
    classes = _subfolders(root)
    if not classes:
        raise UserError(f'image folder "{root}" has no sub folders; it needs one for each class.')
    files, labels = [], []
    for label, name in enumerate(classes):
        with os.scandir(os.path.join(root, name)) as entries:
            images = [entry for entry in entries if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "."]
        for entry in images:
            if not entry.is_file():  # a pipe would be waited for
                raise UserError(f'image "{entry.path}" is no regular file; remove it.')
        names = sorted(entry.name for entry in images)
        files += map(os.fsencode, names)
        labels += [label] * len(names)
    if not files:
        raise UserError(
            f'the {len(classes)} class folders of "{root}" have no images ({" ".join(EXTENSIONS)}); '
            "they must be directly in them."
        )
    return FolderSource(root, classes, files, labels)


def _open_tfds(name: str, path: str, split: str) -> Source:
    import tensorflow_datasets as tfds  # takes 1 s, which only this source should cost

    try:
        builder = tfds.builder(name, data_dir=path or None)
    except Exception as error:  # an unknown set, config or version, or damaged files of it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'config.data.name = "{name}" is no tensorflow-datasets set: {reason}') from error
    if not builder.is_prepared():
        where = f", data_dir='{path}'" if path else ""
        raise UserError(
            f'config.data.name = "{name}" is not prepared in {builder.data_dir}; in Python, run tfds.builder('
            f"'{name}'{where}, file_format='array_record').download_and_prepare()."
        )
    features = dict(builder.info.features.items())
    image = features.get("image")
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise UserError(f'config.data.name = "{name}" has no 8-bit "image" (features: {", ".join(features)}).')
    try:
        return TfdsSource(builder, split)
    except NotImplementedError as error:
        raise UserError(
            f'config.data.name = "{name}" is stored in {builder.data_dir} as '
            f"{builder.info.file_format.value}, which has no random access; prepare it as array_record "
            "in another config.data.path."
        ) from error
    except ValueError as error:  # unknown, malformed or empty split
        reason = str(error).splitlines()[0]
        raise UserError(f'split "{split}" of "{name}" cannot be used: {reason}') from error


def _open_emoji(split: str, size: int) -> Source:
    from dar_jax.data.emoji import open_emoji

    return open_emoji(split, size)


def _open_latents(path: str, split: str) -> Source:
    from dar_jax.data.latents import LatentSource

    if files.is_remote(path):
        return LatentSource(files.path(path) / split)
    return LatentSource(files.path(_subfolder(path, split)))


def open_source(data: ConfigDict, split: str) -> Source:
    """Opens one split of the data set named by the config.

    digits: "train" (1,442 images) and "test" (355): of each class, in stored order, every fifth image is
      held out; 0..16 is scaled to 0..255. 8x8, grey.
    idx: "train" (train-*) and "test" (t10k-*) of the directory `data.path`, gzipped or not; grey.
    folder: the sub folder `split` of `data.path`, "." for `data.path` itself; a class is a sub folder, and
      its label the rank of its name.
    captions: the sub folder `split` of `data.path`, "." for `data.path` itself, with metadata.jsonl and the images
      beside it (data/caption_folder.py); without labels.
    tfds: any split expression of the set `data.name`, prepared as array_record in `data.path`; its features
      are "image" and, if it has them, the class label "label" and the text "caption" or "text". Nothing is downloaded,
      and tensorflow is not imported.
    emoji: "train" (3,394 images with captions) and "test" (377 of combinations that are not in "train"); RGB, rendered
      at `data.image_size` from an installed font (data/emoji.py).
    latents: what dar_jax.prepare wrote to the sub folder `split` of `data.path`, "." for `data.path` itself.
    synthetic: random latents of ImageNet's shapes, whatever the split; not uint8 but float32, and not cropped.

    Args:
      data: `config.data`.
      split: `data.train_split` or `data.eval_split`.

    Returns:
      A `Source`; its order is fixed.

    Raises:
      UserError: a path, file, set or split is missing, empty or damaged.
    """
    check_choice("config.data.source", data.source, SOURCES)
    if files.is_remote(data.path) and data.source != "latents":
        raise UserError(
            f'config.data.path = "{data.path}": only prepared data (config.data.source = "latents") are read from a '
            "bucket; copy the data to a disk and prepare them with python -m dar_jax.prepare."
        )
    source = SOURCES[data.source](data, split)
    if len(source) == 0:
        raise UserError(f'split "{split}" of config.data.source = "{data.source}" has no images; choose another.')
    return source


def read(source: Source, index: int) -> dict[str, Any]:
    """`source[index]`. Raises UserError if its label is none of the classes of the source."""
    example = source[index]
    if not 0 <= example["label"] < source.num_classes:
        raise UserError(
            f"example {index} has the label {example['label']}, but the classes are 0 to {source.num_classes - 1}; "
            "take a split that is labelled, or prepare the data again."
        )
    return example


def suited(source: Source, channels: int, kind: Kind) -> Source:
    """Synthetic data with the channels and the kind of texts that a model takes; all others as they are."""
    if not isinstance(source, SyntheticSource):
        return source
    source = SyntheticSource(source.size, channels)
    return source.with_texts(kind.size, kind.length) if isinstance(kind, Embeddings) else source


def check(data: ConfigDict) -> None:
    """Raises UserError for the first field of `config.data` that cannot work, without a look at any file."""
    check_choice("config.data.source", data.source, SOURCES)


SOURCES = {
    "digits": lambda data, split: _open_digits(split),
    "idx": lambda data, split: _open_idx(data.path, split),
    "folder": lambda data, split: _open_folder(data.path, split),
    "captions": lambda data, split: open_caption_folder(_subfolder(data.path, split)),
    "tfds": lambda data, split: _open_tfds(data.name, data.path, split),
    "emoji": lambda data, split: _open_emoji(split, data.image_size),
    "latents": lambda data, split: _open_latents(data.path, split),
    "synthetic": lambda data, split: SyntheticSource(data.image_size),
}
LATENT_SOURCES = ("latents", "synthetic")  # their records hold latents; all others hold images
