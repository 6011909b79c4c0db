"""Buckets: the ratio an image goes to, how it is cropped, and batches of one size."""

import numpy as np
import pytest
from PIL import Image

from dar_jax import conditions
from dar_jax.data.buckets import assign, nearest, parse_buckets
from dar_jax.data.feed import make_online_encoder
from dar_jax.data.images import center_crop
from dar_jax.data.pipeline import train_iterator
from dar_jax.data.prepare import verify
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.pretrained import vae as vae_lib
from dar_jax.validate import validate
from tests.data.prepared import tiny_vae
from tests.data.test_caption_folder import captions_config, write_captions
from tests.data.test_texts import FakeEncoder, prepare_captions
from tests.training import tiny

# Heights and widths: four squares, three wide, one tall.
SIZES = [(8, 8), (20, 20), (9, 8), (16, 15), (8, 16), (10, 30), (12, 20), (50, 20)]


def bucket_config(root):
    config = captions_config(root)
    config.data.update(image_size=8, buckets=("8x8", "8x16", "16x8"))
    config.model.update(input_size=8, channels=3)
    return config


def test_nearest_ratio():
    buckets = parse_buckets(("8x8", "8x16", "16x8"), "f")
    assert buckets == ((8, 8), (8, 16), (16, 8))
    assert nearest(np.array(SIZES), buckets).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    # Between 1:1 and 1:2 the border is the square root of 1:2, on both sides alike.
    border = np.array([[1000, 1413], [1000, 1415], [1413, 1000], [1415, 1000]])
    assert nearest(border, buckets).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("8x8", "8"), 'config.data.buckets: "8" is no size'),
        (("8x0",), '"8x0" is no size'),
        (("8x8", "16x16"), '"8x8" and "16x16" have the same ratio'),
        (("9x8",), r'the sides of "9x8" must be divisible by config\.model\.patch_size = 2'),
    ],
)
def test_buckets_that_cannot_be(names, message):
    config = bucket_config("")
    config.data.buckets = names
    with pytest.raises(UserError, match=message):
        validate(config)
    config = bucket_config("")
    config.model.family = "sit"
    with pytest.raises(UserError, match="family = sit takes squares of one size"):
        validate(config)


def test_crops_keep_the_middle_and_the_ratio():
    rows, columns = np.meshgrid(np.arange(60), np.arange(90), indexing="ij")
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    crop = center_crop(image, (20, 40))  # scaled to 27 x 40
    assert crop.shape == (20, 40, 3)
    steps = np.diff(crop[2:-2, 2:-2, :2].astype(float), axis=0)[..., 0], np.diff(crop[..., 1].astype(float), axis=1)
    assert abs(steps[0].mean() - 2.25) < 0.1 and abs(steps[1][:, 3:-3].mean() - 2.25) < 0.1
    assert abs(crop[..., 0].mean() - 29.5) < 1 and abs(crop[..., 1].mean() - 44.5) < 1
    np.testing.assert_array_equal(center_crop(image, (60, 30)), image[:, 30:60])
    np.testing.assert_array_equal(center_crop(image, (10, 90)), image[25:35])


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_holds_one_size_and_every_image_comes(tmp_path, flip):
    captions = [f"word{i}" for i in range(8)]
    write_captions(tmp_path, captions, SIZES)
    config = bucket_config(tmp_path)
    config.data.flip = flip
    source, buckets = open_source(config.data, "train"), ((8, 8), (8, 16), (16, 8))
    np.testing.assert_array_equal(assign(source, buckets), nearest(np.array(SIZES), buckets))

    options = {"space": "pixels", "channels": 3, "batch_size": 2, "seed": 1}
    batches = [batch for batch, _ in zip(train_iterator(config.data, **options), range(40), strict=False)]
    seen = np.zeros(8, int)
    for batch in batches:
        values = np.round((batch["x1"] + 1) * 127.5).astype(int)
        assert all(len(np.unique(image)) == 1 for image in values)
        for value in values[:, 0, 0, 0] - 10:
            seen[value] += 1
            assert batch["x1"].shape[1:3] == buckets[nearest(np.array(SIZES), buckets)[value]]
    assert seen.tolist() == [10] * 8  # eighty examples, ten epochs
    assert len({batch["x1"].shape for batch in batches[:12]}) == 3

    # From any step on, in any number of processes.
    rest = train_iterator(config.data, **options, first_step=17, rows=np.array([1]))
    for batch in batches[17:23]:
        np.testing.assert_array_equal(next(rest)["x1"], batch["x1"][1:])


def test_a_damaged_image_is_named_at_the_start(tmp_path):
    folder = write_captions(tmp_path, ["a", "b"])
    (folder / "001.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"train/001\.png. cannot be read"):
        train_iterator(bucket_config(tmp_path).data, space="pixels", channels=3, batch_size=2, seed=0)


def test_buckets_are_encoded_online(tmp_path):
    vae_lib.write(str(tmp_path / "vae"), tiny_vae())
    config = bucket_config(tmp_path)
    config.data.vae = str(tmp_path / "vae")
    config.model.update(space="latents", input_size=4, channels=4)
    validate(config)
    encode = make_online_encoder(config, tiny.make_mesh(1, 1))
    assert encode(np.zeros((2, 8, 16, 3), np.float32), 0).shape == (2, 4, 8, 4)
    config.data.buckets = ("8x8", "8x14")
    with pytest.raises(UserError, match=r'sides of "8x14" must be divisible by 4, the factor of config\.data\.vae'):
        make_online_encoder(config, tiny.make_mesh(1, 1))


def test_prepared_records_have_the_size_of_their_bucket(tmp_path):
    """Moments against the VAE itself; a shard is made of its own images, of which one is damaged."""
    captions = [f"word{i}" for i in range(8)]
    folder, buckets, vae = write_captions(tmp_path / "images", captions, SIZES), ("8x8", "8x16"), tiny_vae()
    (folder / "003.png").write_bytes(b"no image")
    prepare_captions(tmp_path / "images", tmp_path / "data" / "train", FakeEncoder(), vae=vae, shard=5, buckets=buckets)
    config = bucket_config(tmp_path / "data")
    config.data.update(source="latents", image_size=4, buckets=buckets)
    config.model.update(space="latents", input_size=4, channels=4, text="embeddings", text_size=4, text_length=16)
    validate(config)
    source = open_source(config.data, "train")
    # The first shard has images 0 to 4, of which the last is wide.
    assert source.captions == [captions[i] for i in (0, 1, 2, 4, 7, 5, 6)]
    assert source.groups.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert len(source.manifest["skipped"]) == 1 and "003.png" in source.manifest["skipped"][0]
    verify(tmp_path / "data" / "train")
    for i, size in ((2, (8, 8)), (5, (8, 16))):
        value = 10 + captions.index(source.captions[i])
        image = np.full((1, *size, 3), value / 127.5 - 1, np.float32)
        (expected,) = vae.model.apply({"params": vae.params}, image, method="encode")
        np.testing.assert_allclose(source[i]["moments"][0], expected, atol=1e-2)
        np.testing.assert_array_equal(source[i]["text"], FakeEncoder().encode([source.captions[i]])[0])

    kind = conditions.build(config.model)
    batches = train_iterator(config.data, space="latents", channels=4, batch_size=3, seed=0, kind=kind)
    shapes = {(next(batches)["x1"].shape) for _ in range(6)}
    assert shapes == {(3, 4, 4, 4), (3, 4, 8, 4)}

    source.check_patches(4)
    with pytest.raises(UserError, match=r"latents of bucket 8x8 .*patch_size = 3 does not divide"):
        source.check_patches(3)
    config.data.buckets = ("8x8",)
    with pytest.raises(
        UserError, match=r"buckets = \('8x8',\), but the records of .* are prepared in \('8x8', '8x16'\)"
    ):
        train_iterator(config.data, space="latents", channels=4, batch_size=3, seed=0, kind=kind)
    with pytest.raises(UserError, match="--buckets: 8x9 must be divisible by 2, as the VAE asks"):
        prepare_captions(tmp_path / "images", tmp_path / "new", None, vae=vae, buckets=("8x8", "8x9"))


def test_heads_of_images_are_enough(tmp_path):
    Image.new("L", (7, 5)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(whole[:60])  # of which nothing could be decoded
    config = captions_config(tmp_path)
    config.data.source = "folder"
    assert open_source(config.data, ".").image_size(0) == (5, 7)
