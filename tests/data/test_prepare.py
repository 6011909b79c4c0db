"""Prepared shards: what they hold, that a kill does not change them, and that damage is found."""

import io
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dar_jax import files
from dar_jax.data import prepare as prepare_lib
from dar_jax.data.images import center_crop, to_float
from dar_jax.data.latents import LatentSource, read_manifest
from dar_jax.errors import UserError
from dar_jax.pretrained import vae as vae_lib
from tests.data.prepared import prepare_folder, shards, tiny_vae, write_folder


def door(*words, **options):
    command = [sys.executable, "-m", "dar_jax.prepare", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
def test_records_hold_moments_of_image_and_mirror(tmp_path, dtype, tolerance):
    images, vae = write_folder(tmp_path / "images", 12), tiny_vae()
    lines = prepare_folder(tmp_path / "images", tmp_path / "out", vae, dtype=dtype, keep=True)
    source = LatentSource(tmp_path / "out")
    assert (len(source), source.num_classes, source.scale) == (12, 3, 0.18215)
    assert "12 of 12 images" in lines[-2] and "12 examples in 3 shards" in lines[-1]

    def encode(pixels):
        return np.asarray(vae.model.apply({"params": vae.params}, to_float(pixels), method="encode"))

    pixels = np.stack([image for _, image in images])
    expected = np.stack([encode(pixels), encode(pixels[:, :, ::-1])], axis=1)
    for i, (label, image) in enumerate(images):
        example = source[i]
        assert example["label"] == label and isinstance(example["label"], int)
        np.testing.assert_array_equal(example["image"], image)
        assert example["moments"].dtype == dtype and example["moments"].shape == (2, 2, 4, 4, 4)
        np.testing.assert_allclose(example["moments"], expected[i], rtol=tolerance, atol=tolerance)
    assert np.abs(expected[:, 0] - expected[:, 1][..., ::-1, :]).mean() > 0.1  # a mirror's latent is no mirrored latent


def test_manifest_and_bytes_are_as_documented(tmp_path):
    images = write_folder(tmp_path / "images", 7)
    prepare_folder(tmp_path / "images", tmp_path / "out", shard=4)
    manifest = files.read_json(tmp_path / "out" / "manifest.json", dict, "")
    entries = manifest.pop("shards")
    assert manifest == {
        "schema": 1, "source": f"folder:{tmp_path / 'images'}", "split": "train", "num_source": 7, "num_classes": 3,
        "image_size": 8, "crop": "adm", "vae": None, "fields": [["label", "<i4", []], ["image", "|u1", [8, 8, 3]]],
        "shard_size": 4, "num_examples": 7, "skipped": [],
    }  # fmt: skip
    assert [(entry["name"], entry["records"]) for entry in entries] == [
        ("shard-00000-of-00002.array_record", 4),
        ("shard-00001-of-00002.array_record", 3),
    ]
    for entry in entries:
        assert shards(tmp_path / "out")[entry["name"]] == entry["sha256"]
        assert (tmp_path / "out" / entry["name"]).stat().st_size == entry["bytes"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*shards(tmp_path / "out"), "progress"}
    # A record is stored as it is: the label, then the pixels.
    content = (tmp_path / "out" / entries[1]["name"]).read_bytes()
    label, pixels = images[4]
    assert label.to_bytes(4, "little") + pixels.tobytes() in content


def test_images_are_cropped_and_shards_cover_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "_BATCH", 2)
    images = write_folder(tmp_path / "images", 11, side=6)
    prepare_folder(tmp_path / "images", tmp_path / "out", size=4, shard=7)
    source = LatentSource(tmp_path / "out")
    assert [source[i]["label"] for i in range(11)] == [label for label, _ in images]
    assert [entry["records"] for entry in source.manifest["shards"]] == [7, 4]
    for i, (_, image) in enumerate(images):
        np.testing.assert_array_equal(source[i]["image"], center_crop(image, 4))


def test_workers_share_the_shards(tmp_path):
    write_folder(tmp_path / "images", 16)
    prepare_folder(tmp_path / "images", tmp_path / "alone", tiny_vae(), shard=3)
    alone = shards(tmp_path / "alone")
    for index in (2, 0):
        lines = prepare_folder(tmp_path / "images", tmp_path / "out", tiny_vae(), shard=3, worker=(index, 3))
        assert "2 shards to write" in lines[0] and "shards of other workers are not finished" in lines[-1]
        assert not (tmp_path / "out" / "manifest.json").exists()
        with pytest.raises(UserError, match="is unfinished; repeat"):
            read_manifest(tmp_path / "out")
    prepare_folder(tmp_path / "images", tmp_path / "out", tiny_vae(), shard=3, worker=(1, 3))
    assert shards(tmp_path / "out") == alone and len(alone) == 7


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", 15)
    prepare_folder(tmp_path / "images", tmp_path / "whole")
    write, written = prepare_lib._write_shard, []

    def write_one(directory, name, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        write(directory, name, *rest)

    monkeypatch.setattr(prepare_lib, "_write_shard", write_one)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(tmp_path / "images", tmp_path / "out")
    first = tmp_path / "out" / written[0]
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(prepare_lib, "_write_shard", write)
    assert "1 of them are finished" in prepare_folder(tmp_path / "images", tmp_path / "out")[0]
    assert first.stat().st_mtime_ns == before
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    (tmp_path / "out" / "manifest.json").unlink()
    first.write_bytes(first.read_bytes()[:-1])  # as a copy cut short leaves it
    assert "2 of them are finished" in prepare_folder(tmp_path / "images", tmp_path / "out")[0]
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    before = first.stat().st_mtime_ns
    assert "is finished" in prepare_folder(tmp_path / "images", tmp_path / "out")[0]
    assert first.stat().st_mtime_ns == before


def kill_and_restart(command, root, kills, longest):
    """Kills the command `kills` times at random points of its work, then lets it finish; compares with a whole run.

    At any time, a shard under its final name must be whole.
    """
    assert subprocess.run([*command, f"--out={root / 'whole'}"]).returncode == 0
    whole, out = shards(root / "whole"), root / "out"
    clock, killed = random.Random(0), 0
    while killed < kills:
        process = subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if "shards to write" in line)  # the clock starts with the work
        time.sleep(clock.uniform(0, longest))
        process.kill()
        process.communicate()
        if (out / "manifest.json").exists():
            shutil.rmtree(out)  # it was faster than the clock: again
        else:
            killed += 1
            assert shards(out).items() <= whole.items()
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shards(out) == whole


def test_kill_9_at_random_points(tmp_path):
    write_folder(tmp_path / "images", 600, side=16)
    command = [sys.executable, "-m", "dar_jax.prepare", f"--source=folder:{tmp_path / 'images'}", "--image_size=16"]
    command += ["--vae=none", "--shard_size=30"]
    kill_and_restart(command, tmp_path, kills=4, longest=0.15)


@pytest.mark.slow
def test_kill_9_at_ten_random_points_with_a_vae(tmp_path):
    write_folder(tmp_path / "images", 300, side=16)
    vae_lib.write(str(tmp_path / "vae"), tiny_vae())
    command = [sys.executable, "-m", "dar_jax.prepare", f"--source=folder:{tmp_path / 'images'}", "--image_size=16"]
    command += [f"--vae={tmp_path / 'vae'}", "--shard_size=9", "--keep_images"]
    kill_and_restart(command, tmp_path, kills=10, longest=12)


def test_images_that_cannot_be_read_are_reported_and_left_out(tmp_path):
    images = write_folder(tmp_path / "images", 14, damaged=(1, 4, 7, 10, 13, 3))  # all of class 1, one of class 0
    lines = prepare_folder(tmp_path / "images", tmp_path / "out", tiny_vae(), shard=5, skip=6)
    source = LatentSource(tmp_path / "out")
    assert [source[i]["label"] for i in range(len(source))] == [label for label, _ in images] == [0] * 4 + [2] * 4
    skipped = [line for line in lines if line.startswith("skipped: ")]
    assert len(skipped) == 6 and re.search(r"0003\.png.* cannot be read", skipped[0])
    manifest = read_manifest(tmp_path / "out")
    assert [line.removeprefix("skipped: ") for line in skipped] == manifest["skipped"]
    assert [entry["records"] for entry in manifest["shards"]] == [4, 0, 4]
    with pytest.raises(UserError, match=r"0013\.png.* one more than --max_skipped = 5"):
        prepare_folder(tmp_path / "images", tmp_path / "few", shard=5, skip=5)
    # The shards that were finished count: the same command fails at the same image.
    with pytest.raises(UserError, match=r"0013\.png.* one more than --max_skipped = 5"):
        prepare_folder(tmp_path / "images", tmp_path / "few", shard=5, skip=5)


def test_full_disk_is_one_line_and_the_command_goes_on(tmp_path):
    write_folder(tmp_path / "images", 6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"--out = .*/out. cannot be written: File too large"):
            prepare_folder(tmp_path / "images", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    prepare_folder(tmp_path / "images", tmp_path / "out")
    assert len(LatentSource(tmp_path / "out")) == 6


def test_no_image_at_all_is_an_error(tmp_path):
    write_folder(tmp_path / "images", 4, damaged=range(4))
    with pytest.raises(UserError, match=r"none of the 4 images could be read: .*0000\.png"):
        prepare_folder(tmp_path / "images", tmp_path / "out", skip=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damaged_progress_is_made_up_for(tmp_path):
    """A shard whose record of progress cannot be read is written again."""
    write_folder(tmp_path / "images", 6)
    prepare_folder(tmp_path / "images", tmp_path / "out")
    expected = shards(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    for number, content in enumerate(["", '{"bytes": "x"}']):
        (tmp_path / "out" / "progress" / f"shard-{number:05}-of-00002.array_record.json").write_text(content)
    prepare_folder(tmp_path / "images", tmp_path / "out")
    assert shards(tmp_path / "out") == expected


def test_another_command_cannot_go_on(tmp_path):
    write_folder(tmp_path / "images", 6)
    images, out = tmp_path / "images", tmp_path / "out"
    prepare_folder(images, out, tiny_vae(), worker=(0, 2))
    for options, message in (
        ({"size": 10}, "image_size = 8, not 10"),
        ({"dtype": "float32"}, "fields = .*<f2.*, not .*<f4"),
        ({"shard": 4}, "shard_size = 5, not 4"),
        ({"vae": tiny_vae(seed=1)}, "vae = .*fingerprint"),
        ({"vae": None}, "vae = .*, not None"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_folder(images, out, **{"vae": tiny_vae(), **options})
    with pytest.raises(UserError, match="--image_size = 9 must be divisible by 2"):
        prepare_folder(images, tmp_path / "odd", tiny_vae(), size=9)
    with pytest.raises(UserError, match="cannot be written"):
        prepare_folder(images, tmp_path / "images" / "train" / "class0" / "0000.png" / "out")


def test_a_workdir_is_no_place_for_data(tmp_path):
    write_folder(tmp_path / "images", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the workdir of a run; take another"):
        prepare_folder(tmp_path / "images", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_numbers_that_float16_cannot_hold(tmp_path):
    write_folder(tmp_path / "images", 3)
    vae = tiny_vae()
    params = {**vae.params, "quant_conv": {**vae.params["quant_conv"], "bias": np.full(8, 1e5, np.float32)}}
    with pytest.raises(UserError, match="no numbers of float16"):
        prepare_folder(tmp_path / "images", tmp_path / "out", vae._replace(params=params))


def test_door_prepares_and_verifies(tmp_path):
    write_folder(tmp_path / "images", 6)
    out = tmp_path / "out"
    words = [f"--source=folder:{tmp_path / 'images'}", "--image_size=8", "--shard_size=4", f"--out={out}"]
    done = door(*words, "--vae=none")
    assert done.returncode == 0 and "6 examples in 2 shards" in done.stdout, done.stderr
    done = door(f"--out={out}", "--verify")
    assert done.returncode == 0 and "is whole: 6 examples in 2 shards" in done.stdout, done.stderr
    shard = out / "shard-00001-of-00002.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    failed = door(f"--out={out}", "--verify")
    assert failed.returncode == 2 and "1 of 2 shards" in failed.stderr and shard.name in failed.stderr


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Five JPEG images with the feature names of imagenet2012; image i is of class i % 4 and 8 + i pixels high."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=4),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 8 + i), (40 * i, 0, 200)).save(buffer, "JPEG", quality=100)
            # Encoded bytes: to encode arrays, tensorflow-datasets would import tensorflow.
            yield i, {"image": io.BytesIO(buffer.getvalue()), "label": i % 4, "file_name": f"{i}.JPEG"}


def test_door_reads_tensorflow_datasets(tmp_path):
    TinyImagenet(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    words = ["--source=tfds:tiny_imagenet", f"--data_dir={tmp_path / 'tfds'}", "--image_size=8", "--vae=none"]
    done = door(*words, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    source = LatentSource(tmp_path / "out")
    assert (len(source), source.num_classes, source.manifest["source"]) == (5, 4, "tfds:tiny_imagenet")
    found = sorted((int(source[i]["image"][4, 4, 0]) / 40, source[i]["label"]) for i in range(5))
    np.testing.assert_allclose(found, [(i, i % 4) for i in range(5)], atol=0.1)  # the red of JPEG is not exact


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vae=none", "--source=folder:/nowhere"], "--source = folder:/nowhere: .*no directory"),
        (["--vae=none", "--source=digits"], '--source = "digits" must be tfds:NAME, folder:PATH, captions:PATH or idx'),
        (["--vae=none", "--source=folder:/", "--worker=4/4"], '--worker = "4/4" must be i/n'),
        (["--source=folder:/nowhere"], "--vae is required"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_door_names_mistakes(tmp_path, words, message):
    failed = door(*words, f"--out={tmp_path / 'out'}")
    assert failed.returncode == 2 and re.search(message, failed.stderr) and failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
