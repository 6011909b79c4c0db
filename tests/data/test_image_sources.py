"""Sources against hand-written bytes, files and records."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from dar_jax.config import default
from dar_jax.data import sources
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


def data_config(source, path="", name=""):
    data = default().data
    data.source, data.path, data.name = source, str(path), name
    return data


def test_digits_split_is_fixed_stratified_and_complete():
    train, test = (open_source(data_config("digits"), split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (1442, 355, 10)
    raw = load_digits()
    seen = {label: 0 for label in range(10)}
    rows = {True: iter(range(len(test))), False: iter(range(len(train)))}
    for picture, label in zip(raw.images, raw.target, strict=True):
        seen[label] += 1
        held_out = seen[label] % 5 == 0
        example = (test if held_out else train)[next(rows[held_out])]
        assert example["label"] == label and isinstance(example["label"], int)
        assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
        assert np.abs(example["image"][..., 0] / 255 - picture / 16).max() <= 0.5 / 255 + 1e-9
    assert next(rows[True], None) is None and next(rows[False], None) is None


@pytest.mark.parametrize("source", ["digits", "idx"])
def test_unknown_split_of_fixed_splits(source, tmp_path):
    with pytest.raises(UserError, match=r'"tset" is unknown\. Did you mean "test"'):
        open_source(data_config(source, tmp_path), "tset")


def write_idx(path, images=None, labels=None, prefix="train", suffix=""):
    write = gzip.compress if suffix else bytes
    if images is not None:
        content = b"\x00\x00\x08\x03" + struct.pack(">III", len(images), 2, 3) + bytes(np.ravel(images).tolist())
        (path / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(write(content))
    if labels is not None:
        content = b"\x00\x00\x08\x01" + struct.pack(">I", len(labels)) + bytes(labels)
        (path / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(write(content))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_bytes(tmp_path, suffix):
    write_idx(tmp_path, [[1, 2, 3, 4, 5, 6], [250, 251, 252, 253, 254, 255]], [4, 0], suffix=suffix)
    write_idx(tmp_path, [[9] * 6], [2], "t10k", suffix)
    train = open_source(data_config("idx", tmp_path), "train")
    assert (len(train), train.num_classes) == (2, 5)
    np.testing.assert_array_equal(train[0]["image"], [[[1], [2], [3]], [[4], [5], [6]]])
    np.testing.assert_array_equal(train[1]["image"], [[[250], [251], [252]], [[253], [254], [255]]])
    assert [train[i]["label"] for i in range(2)] == [4, 0]
    test = open_source(data_config("idx", tmp_path), "test")
    assert len(test) == 1 and test[0]["label"] == 2 and (test[0]["image"] == 9).all()


def test_idx_missing_files_are_named(tmp_path):
    write_idx(tmp_path, [[0] * 6])
    with pytest.raises(UserError, match=r"no train-labels-idx1-ubyte.*apt-get install dataset-fashion-mnist") as error:
        open_source(data_config("idx", tmp_path), "train")
    assert "images-idx3" not in str(error.value)
    with pytest.raises(UserError, match=r"no t10k-images-idx3-ubyte.* and no t10k-labels-idx1-ubyte"):
        open_source(data_config("idx", tmp_path / "nowhere"), "test")


def test_idx_damage_is_named(tmp_path):
    write_idx(tmp_path, [[0] * 6, [1] * 6], [0, 1])
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for content in (
        whole[:-1],
        whole + b"\x00",
        whole[:9],
        b"",
        b"\x00\x00\x0d\x03" + whole[4:],
        b"\x00" * 16,
    ):
        images.write_bytes(content)
        with pytest.raises(UserError, match=str(images)):
            open_source(data_config("idx", tmp_path), "train")
    images.unlink()
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    damaged = bytearray(gzip.compress(whole))
    damaged[12] ^= 0xFF
    for content in (gzip.compress(whole)[:-9], whole, bytes(damaged)):
        packed.write_bytes(content)
        with pytest.raises(UserError, match=str(packed)):
            open_source(data_config("idx", tmp_path), "train")


def test_idx_counts_must_agree_and_not_be_zero(tmp_path):
    write_idx(tmp_path, [[0] * 6, [1] * 6], [0])
    with pytest.raises(UserError, match=r"2 images.* 1 labels"):
        open_source(data_config("idx", tmp_path), "train")
    write_idx(tmp_path, [], [])
    with pytest.raises(UserError, match=r'"train".*no images'):
        open_source(data_config("idx", tmp_path), "train")


@pytest.mark.skipif(not os.path.isdir(FASHION_MNIST), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    source = open_source(data_config("idx", FASHION_MNIST), "test")
    assert (len(source), source.num_classes, source[0]["image"].shape) == (10_000, 10, (28, 28, 1))
    assert np.bincount(source.labels).tolist() == [1000] * 10


def write_image(path, value, shape=(4, 5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def test_folder_order_follows_names(tmp_path):
    names = [f"{i * 37 % 30:02}" for i in range(30)]
    for name in names:
        write_image(tmp_path / f"class{int(name) % 7}" / f"{name}.png", int(name))
    source = open_source(data_config("folder", tmp_path), ".")
    examples = [source[i] for i in range(len(source))]
    expected = sorted((i % 7, i) for i in range(30))
    assert [(e["label"], int(e["image"].flat[0])) for e in examples] == expected


def test_folder_takes_images_only_and_reads_them_late(tmp_path):
    write_image(tmp_path / "val" / "a_dog" / "x.png", 30, (7, 6))
    write_image(tmp_path / "val" / "b_cat" / "1.PNG", 10)
    (tmp_path / "val" / "c_empty").mkdir()
    write_image(tmp_path / "val" / "d_yak" / "ä.png", 40)
    (tmp_path / "val" / "d_yak" / "ü.jpg").write_bytes(b"\xff\xd8 broken")
    for ignored in ("b_cat/notes.txt", "b_cat/._2.png", "README.png"):
        (tmp_path / "val" / ignored).write_bytes(b"no image")
    write_image(tmp_path / "val" / ".cache" / "0.png", 50)
    source = open_source(data_config("folder", tmp_path), "val")
    source = pickle.loads(pickle.dumps(source))
    assert (len(source), source.num_classes) == (4, 4)
    examples = [source[i] for i in range(3)]
    assert [(e["label"], int(e["image"].flat[0]), e["image"].shape) for e in examples] == [
        (0, 30, (7, 6, 1)),
        (1, 10, (4, 5, 3)),
        (3, 40, (4, 5, 3)),
    ]
    with pytest.raises(UserError, match=r"d_yak/ü\.jpg"):
        source[3]
    for split in ("", "."):
        assert len(open_source(data_config("folder", tmp_path / "val"), split)) == 4


def test_folder_errors(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "validation" / "cat").mkdir(parents=True)
    for path, split, message in (
        ("", "train", 'config.data.path = "" is no directory'),
        (tmp_path / "nowhere", "train", "nowhere"),
        (tmp_path, "vaildation", 'Did you mean "validation"'),
        (tmp_path, "train", "has no sub folders"),
        (tmp_path, "validation", "have no images"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data_config("folder", path), split)


def test_folder_waits_for_no_pipe(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/nowhere.png")):
        make(tmp_path / "train" / "cat" / "b.png")
        with pytest.raises(UserError, match=r"cat/b\.png. is no regular file"):
            open_source(data_config("folder", tmp_path), "train")
        (tmp_path / "train" / "cat" / "b.png").unlink()


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Six images of heights 4 to 9, grey value 40 * i and label i % 3, among them a grey and a CMYK file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=3),
            "note": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            buffer = io.BytesIO()
            mode = {1: "L", 2: "CMYK"}.get(i, "RGB")
            Image.new("RGB", (5, 4 + i), (40 * i,) * 3).convert(mode).save(buffer, "TIFF" if i == 2 else "PNG")
            # Encoded bytes: to encode arrays, tensorflow-datasets would import tensorflow.
            yield i, {"image": io.BytesIO(buffer.getvalue()), "label": i % 3, "note": "x"}


class TinyPlain(TinyShapes):
    """The same without labels."""

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self):
        for key, example in super()._generate_examples():
            yield key, {"image": example["image"]}


class TinyCaptions(TinyShapes):
    """The same with captions, "number 0" to "number 5"."""

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        for key, example in super()._generate_examples():
            yield key, {"image": example["image"], "caption": f"number {key}"}


@pytest.fixture(scope="module")
def tiny_shapes(tmp_path_factory):
    """A tensorflow-datasets data_dir with the three sets as array_record."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for builder in (TinyShapes, TinyPlain, TinyCaptions):
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_tfds_records(tiny_shapes):
    source = open_source(data_config("tfds", tiny_shapes, "tiny_shapes"), "train")
    source = pickle.loads(pickle.dumps(source))
    assert (len(source), source.num_classes) == (6, 3)
    examples = [source[i] for i in range(6)]
    heights = [e["image"].shape[0] - 4 for e in examples]  # tfds stores records in an order of its own
    assert sorted(heights) == list(range(6))
    for i, example in zip(heights, examples, strict=True):
        assert example["image"].shape == (4 + i, 5, 1 if i == 1 else 3)
        assert (example["image"] == 40 * i).all() and example["label"] == i % 3
    assert len(open_source(data_config("tfds", tiny_shapes, "tiny_shapes"), "train[:50%]")) == 3


def test_tfds_without_labels(tiny_shapes):
    source = open_source(data_config("tfds", tiny_shapes, "tiny_plain"), "train")
    assert (source.num_classes, source[3]["label"]) == (1, 0)


def test_tfds_captions_are_gathered_without_decoding_an_image(tiny_shapes, monkeypatch):
    source = open_source(data_config("tfds", tiny_shapes, "tiny_captions"), "train")
    examples = [source[i] for i in range(6)]
    assert all(e["caption"] == f"number {e['image'].shape[0] - 4}" and e["label"] == 0 for e in examples)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "decode_image", None)
        assert pickle.loads(pickle.dumps(source)).captions == [e["caption"] for e in examples]
    # A text of another name is no caption.
    source = open_source(data_config("tfds", tiny_shapes, "tiny_shapes"), "train")
    assert source.captions is None and "caption" not in source[0]


def test_tfds_errors(tiny_shapes):
    for name, split, message in (
        ("tiny_shape", "train", '"tiny_shape" is no tensorflow-datasets set'),
        ("", "train", 'config.data.name = ""'),
        ("mnist", "train", r"mnist.*not prepared.*array_record.*download_and_prepare"),
        ("tiny_shapes", "test", r'"test" of "tiny_shapes".*train'),
        ("tiny_shapes", "train[", r'"train\["'),
        ("tiny_shapes", "", '""'),
        ("tiny_shapes", "train[:0]", r'"train\[:0\]"'),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_source(data_config("tfds", tiny_shapes, name), split)
        assert "\n" not in str(error.value)


def test_tfds_is_read_without_tensorflow_and_without_the_builder(tiny_shapes):
    code = (
        "import sys\n"
        "from dar_jax.config import default\n"
        "from dar_jax.data.sources import open_source\n"
        "data = default().data\n"
        f"data.source, data.path, data.name = 'tfds', {str(tiny_shapes)!r}, 'tiny_shapes'\n"
        "source = open_source(data, 'train')\n"
        "examples = [source[i] for i in range(len(source))]\n"
        "heights = sorted(example['image'].shape[0] for example in examples)\n"
        "print(heights, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[4, 5, 6, 7, 8, 9] False"
