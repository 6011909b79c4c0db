"""Training batches from prepared data: draws, mirrors, order, resumption, and every way the data can be wrong."""

import functools
import json
import pickle

import numpy as np
import pytest

from dar_jax import files
from dar_jax.config import default
from dar_jax.data.latents import draw_latent
from dar_jax.data.pipeline import load_images, train_iterator
from dar_jax.data.prepare import verify
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.pretrained import vae as vae_lib
from tests.data import test_pipeline
from tests.data.prepared import prepare_folder, tiny_vae, write_folder
from tests.data.test_pipeline import take

COUNT = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with the split "train" of 24 records in shards of 7, and the VAE that made it."""
    root = tmp_path_factory.mktemp("prepared")
    write_folder(root / "images", COUNT)
    prepare_folder(root / "images", root / "latents" / "train", tiny_vae(), keep=True, shard=7)
    vae_lib.write(str(root / "vae"), tiny_vae())
    return root


def data_config(root, flip=True):
    data = default().data
    data.update(source="latents", path=str(root / "latents"), image_size=4, flip=flip, vae=str(root / "vae"))
    return data


iterate = functools.partial(test_pipeline.iterate, batch_size=8, channels=4)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["condition"]["label"], b["condition"]["label"])
        np.testing.assert_array_equal(a["x1"], b["x1"])


def explain(source, batches):
    """The record of every draw, whether its mirror was drawn, and the noise: those of the least noise.

    z = 0.18215 (mean + std * noise) is solved for the noise of every record and mirror.
    """
    moments = np.stack([source[i]["moments"] for i in range(len(source))]).astype(np.float64)  # [N, 2, 2, h, w, C]
    mean, std = moments[:, :, 0], moments[:, :, 1]
    for batch in batches:
        for latent, label in zip(batch["x1"], batch["condition"]["label"], strict=True):
            noise = (latent / 0.18215 - mean) / std
            size = np.square(noise).mean(axis=(2, 3, 4))
            record, mirror = np.unravel_index(size.argmin(), size.shape)
            assert source[int(record)]["label"] == label
            yield int(record), int(mirror), noise[record, mirror]


def test_latents_are_fresh_draws_of_the_image_or_its_mirror(prepared):
    source, batches = (
        open_source(data_config(prepared), "train"),
        take(iterate(data_config(prepared), batch_size=COUNT), 30),
    )
    assert all(batch["x1"].dtype == np.float32 and batch["x1"].shape == (COUNT, 4, 4, 4) for batch in batches)
    records, mirrors, noises = zip(*explain(source, batches), strict=True)
    for epoch in np.reshape(records, (30, COUNT)):
        assert sorted(epoch) == list(range(COUNT))
    noises, size = np.stack(noises), np.size(noises)  # 720 draws of 64 numbers
    assert abs(noises.mean()) < 5 / np.sqrt(size) and abs(noises.var() - 1) < 5 * np.sqrt(2 / size)
    assert len({noise.tobytes() for noise in noises}) == len(noises)
    assert 0.4 < np.mean(mirrors) < 0.6  # 720 fair coins: 5 standard deviations


def test_without_flip_there_are_no_mirrors(prepared):
    data = data_config(prepared, flip=False)
    _, mirrors, _ = zip(*explain(open_source(data, "train"), take(iterate(data, batch_size=COUNT), 3)), strict=True)
    assert not any(mirrors)


def test_draw_is_mean_plus_std_noise_shifted_and_scaled():
    moments = np.stack([np.full((2, 2, 4), 3.0), np.full((2, 2, 4), 0.5)]).astype(np.float16)
    noise = np.random.default_rng(5).standard_normal((2, 2, 4), np.float32)
    shift, scale = np.float32([1, 0, 0, 0]), np.float32(2)
    drawn = draw_latent(moments, shift, scale, np.random.default_rng(5))
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, np.array([4, 6, 6, 6]) + noise, rtol=1e-6)


def test_resume_continues_bit_for_bit(prepared):
    data = data_config(prepared)
    expected = take(iterate(data, index=1, count=2), 7)
    assert_same(take(iterate(data, index=1, count=2, first_step=3), 4), expected[3:])


def test_worker_processes_can_read(prepared):
    source = open_source(data_config(prepared), "train")
    first = source[3]
    again = pickle.loads(pickle.dumps(source))[3]
    assert again["label"] == first["label"]
    np.testing.assert_array_equal(again["moments"], first["moments"])


def test_processes_together_draw_the_same(prepared):
    data = data_config(prepared)
    whole = take(iterate(data), 5)
    parts = [take(iterate(data, index=index, count=4), 5) for index in range(4)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step]["x1"] for part in parts]), batch["x1"])


def test_kept_images_are_pixels_like_any_others(prepared):
    """Three channels ask for the pixels of the same records, in training and for evaluation."""
    data = data_config(prepared, flip=False)
    data.image_size = 8
    folder = default().data
    folder.update(source="folder", path=str(prepared / "images"), image_size=8)
    assert_same(take(iterate(data, channels=3), 4), take(iterate(folder, channels=3), 4))
    for ours, theirs in zip(*(load_images(d, "train", channels=1) for d in (data, folder)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def copied(prepared, tmp_path):
    """A config of a copy of the shards."""
    out = tmp_path / "latents" / "train"
    out.mkdir(parents=True)
    for path in (prepared / "latents" / "train").iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    data = data_config(prepared)
    data.path = str(tmp_path / "latents")
    return data, out


def change_manifest(out, **fields):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**files.unseal(manifest), **fields}))


def flip_a_byte(out):
    shard = out / "shard-00002-of-00004.array_record"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 0x10
    shard.write_bytes(content)


def zero_the_head(out):
    """What the reader looks at before anyone compares a checksum."""
    shard = out / "shard-00000-of-00004.array_record"
    shard.write_bytes(bytes(shard.stat().st_size))


def change_shards(out, change):
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    change(shards)
    change_manifest(out, shards=shards)


def rename_shard(out, name):
    (out.parent / "shard-00000-of-00004.array_record").write_bytes(b"")
    change_shards(out, lambda shards: shards[0].update(name=name))


def move_a_record(out):
    """The sum stays, and no shard has the count that it says."""

    def change(shards):
        shards[0]["records"] += 1
        shards[1]["records"] -= 1

    change_shards(out, change)


def truncate(out):
    shard = out / "shard-00001-of-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"1 of 4 shards .* damaged \(checksum\): shard-00002-of-00004"),
        (truncate, "shard-00001-of-00004.array_record.* bytes, not the"),
        (lambda out: (out / "shard-00003-of-00004.array_record").unlink(), "shard-00003-of-00004.* is missing"),
        (lambda out: change_manifest(out, vae={"fingerprint": "f00" * 20, "scale": 1.0}), "are of f00f00f00"),
        (lambda out: change_manifest(out, vae={"fingerprint": "f", "scale": [1.0] * 3}), "are not of 4 channels"),
        (
            lambda out: change_manifest(out, vae={"fingerprint": "f", "scale": 1, "shift": "a"}),
            "manifest.json. cannot be",
        ),
        (lambda out: change_manifest(out, schema=2), '"schema" is 2, not 1'),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json.* cannot be read"),
        (lambda out: (out / "manifest.json").unlink(), "holds no manifest.json; make it with"),
        (zero_the_head, "shard-00000-of-00004.array_record. is damaged"),
        (lambda out: rename_shard(out, "../shard-00000-of-00004.array_record"), "is no file of its folder"),
        (lambda out: rename_shard(out, str(out / "shard-00000-of-00004.array_record")), "is no file of its folder"),
        (lambda out: move_a_record(out), "array_record. has [0-9]+ records, not"),
        (lambda out: change_manifest(out, num_examples=5), "num_examples = 5, but its shards make"),
        (lambda out: change_manifest(out, fields=[["label", "<i4", []]]), "fields label"),
        (lambda out: change_manifest(out, fields=[["label", "what"]]), "manifest.json. cannot be read"),
        (lambda out: change_manifest(out, vae=None), "manifest.json. cannot be read"),
    ],
)
def test_damage_is_one_line_before_training(prepared, tmp_path, damage, message):
    data, out = copied(prepared, tmp_path)
    iterate(data).close()
    damage(out)
    with pytest.raises(UserError, match=message) as error:
        iterate(data)
    assert "\n" not in str(error.value)


def test_labels_must_be_classes(prepared, tmp_path):
    """Three classes are in the records; the model's null label would be the third."""
    data, out = copied(prepared, tmp_path)
    verify(out)
    change_manifest(out, num_classes=2)
    with pytest.raises(UserError, match="has the label 2, but the classes are 0 to 1"):
        take(iterate(data, batch_size=COUNT), 1)
    with pytest.raises(UserError, match="has the label 2"):
        verify(out)


def test_verify_reads_every_record(prepared, tmp_path):
    """A manifest whose checksum agrees with a damaged shard."""
    _, out = copied(prepared, tmp_path)
    flip_a_byte(out)
    name = "shard-00002-of-00004.array_record"
    change_shards(out, lambda shards: shards[2].update(sha256=files.sha256(out / name)))
    with pytest.raises(UserError, match=r"record [0-9]+ of .* is damaged"):
        verify(out)


def test_checksums_can_be_left_to_verify(prepared, tmp_path):
    """config.data.verify = False, and a process that is given other shards, start on a flipped byte."""
    data, out = copied(prepared, tmp_path)
    flip_a_byte(out)
    for others, rows in (([0, 1, 2, 3], [4, 5, 6, 7]), ([2, 3, 6, 7], [0, 1, 4, 5])):  # as devices may lie on hosts
        read = functools.partial(train_iterator, data, space="latents", channels=4, batch_size=8, seed=3)
        read(rows=np.array(others)).close()
        with pytest.raises(UserError, match="1 of 2 shards"):
            read(rows=np.array(rows))
    data.verify = False
    iterate(data).close()


@pytest.mark.parametrize(
    ("fields", "channels", "message"),
    [
        ({"image_size": 8}, 4, "image_size = 8, .* which are 4x4x4"),
        ({}, 5, "channels = 5 do not suit"),
        ({"train_split": "val"}, 4, 'split "val" is no sub folder'),
        ({"vae": "/nowhere"}, 4, '"/nowhere/vae.json" cannot be read .*; config.data.vae must'),
    ],
    ids=["size", "channels", "split", "vae"],
)
def test_configs_that_do_not_suit(prepared, fields, channels, message):
    data = data_config(prepared)
    data.update(fields)
    with pytest.raises(UserError, match=message):
        iterate(data, channels=channels)


def test_what_the_records_lack_is_named(prepared, tmp_path):
    prepare_folder(prepared / "images", tmp_path / "pixels" / "train")
    prepare_folder(prepared / "images", tmp_path / "moments" / "train", tiny_vae())
    data = data_config(prepared)
    for name, channels, message in (("pixels", 4, "moments.* --vae=DIR"), ("moments", 3, "image.* --keep_images")):
        data.path = str(tmp_path / name)
        with pytest.raises(UserError, match=message):
            iterate(data, channels=channels)
    with pytest.raises(UserError, match="--keep_images"):
        load_images(data, "train", channels=3)
