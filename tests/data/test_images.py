"""Crops, channels, ranges and decoding of single images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dar_jax.data.images import center_crop, decode_image, to_channels, to_float, to_uint8
from dar_jax.errors import UserError


def noise(*shape):
    return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


def adm_crop(rgb, target):
    """The published recipe, restated on PIL images: halve, bicubic, cut."""
    picture = Image.fromarray(rgb)
    w, h = picture.size
    while w >= 2 * target and h >= 2 * target:
        w, h = w // 2, h // 2
        picture = picture.resize((w, h), resample=Image.BOX)
    factor = target / (w if w < h else h)
    picture = picture.resize((round(w * factor), round(h * factor)), resample=Image.BICUBIC)
    left, upper = (picture.size[0] - target) // 2, (picture.size[1] - target) // 2
    return np.asarray(picture.crop((left, upper, left + target, upper + target)))


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (16, 16), (64, 64), (33, 100), (9, 12), (15, 47)])
def test_center_crop_agrees_with_adm(shape):
    image = noise(*shape, 3)
    np.testing.assert_array_equal(center_crop(image, 16), adm_crop(image, 16))
    grey = image[..., :1]
    np.testing.assert_array_equal(center_crop(grey, 16)[..., 0], adm_crop(grey[..., 0], 16))


def test_halving_is_a_rounded_mean_in_each_pass():
    image = noise(16, 16, 1)
    expected = image[..., 0].astype(int)
    for _ in range(2):
        quads = expected.reshape(len(expected) // 2, 2, -1, 2).transpose(0, 2, 1, 3)
        # PIL filters rows, rounds, and then filters columns.
        expected = ((quads.sum(-1) + 1) // 2).sum(-1)
        expected = (expected + 1) // 2
    np.testing.assert_array_equal(center_crop(image, 4)[..., 0], expected)


def test_constant_stays_constant_and_a_ramp_stays_a_ramp():
    assert (center_crop(np.full((50, 81, 3), 93, np.uint8), 20) == 93).all()
    ramp = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (40, 40, 1))
    small = center_crop(ramp, 30)[:, 3:-3, 0].astype(float)  # borders have no bicubic support
    exact = 6 * ((np.arange(30) + 0.5) * 40 / 30 - 0.5)
    np.testing.assert_allclose(small, np.broadcast_to(exact[3:-3], small.shape), atol=0.6)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_the_right_size_is_unchanged(channels):
    image = noise(28, 28, channels)
    np.testing.assert_array_equal(center_crop(image, 28), image)


def test_right_short_side_is_only_cut():
    image = noise(8, 13, 3)
    np.testing.assert_array_equal(center_crop(image, 8), image[:, 2:10])
    np.testing.assert_array_equal(center_crop(image.transpose(1, 0, 2), 8), image.transpose(1, 0, 2)[2:10])


def test_ranges():
    values = np.arange(256, dtype=np.uint8)
    floats = to_float(values)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, np.linspace(-1, 1, 256), atol=1e-7)
    assert floats[0] == -1 and floats[255] == 1
    np.testing.assert_array_equal(to_uint8(floats), values)
    # 127.5 x + 128 is 255.5, -127, 128, 191.75 and 0.5: clamped, then truncated.
    np.testing.assert_array_equal(to_uint8(np.array([1.0, -2.0, 0.0, 0.5, -1.0])), [255, 0, 128, 191, 0])
    assert to_uint8(np.array([7.0])).dtype == np.uint8


def test_channels():
    grey = noise(5, 4, 1)
    rgb = to_channels(grey, 3)
    assert rgb.shape == (5, 4, 3) and (rgb == grey).all()
    np.testing.assert_array_equal(to_channels(rgb, 1), grey)
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(to_channels(primaries, 1)[0, :, 0], [0.299 * 255, 0.587 * 255, 0.114 * 255], atol=1)
    assert to_channels(grey, 1) is grey


def encoded(picture, form):
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P"])
def test_decode_gives_grey_or_rgb(mode):
    picture = Image.fromarray(noise(6, 9, 3) // 128 * 255)  # corners of the colour cube: a palette holds them
    source = picture.convert(mode)
    decoded = decode_image(encoded(source, "PNG"), "x")
    expected = np.asarray(source.convert("RGB"))
    assert decoded.dtype == np.uint8 and decoded.shape == (6, 9, 3 if mode in ("RGB", "RGBA", "P") else 1)
    np.testing.assert_array_equal(np.broadcast_to(decoded, expected.shape), expected)


def test_decode_converts_cmyk():
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
    np.testing.assert_allclose(decoded, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)


def png_of_16_bits(color_type, channels):
    """A PNG of 2 x 2 pixels with 16 bits per channel, which PIL reads and cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 2, 16, color_type, 0, 0, 0)
    rows = (b"\0" + bytes(range(4 * channels))) * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_not_cut(color_type, channels):
    with pytest.raises(UserError, match=r'"deep.png".*more than 8 bits per channel'):
        decode_image(io.BytesIO(png_of_16_bits(color_type, channels)), "deep.png")


def test_decode_errors_name_the_image():
    deep = encoded(Image.fromarray(noise(4, 4).astype(np.uint16) * 257), "PNG")
    with pytest.raises(UserError, match=r'"deep.png".*8 bits'):
        decode_image(deep, "deep.png")
    whole = encoded(Image.fromarray(noise(32, 32, 3)), "PNG").getvalue()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match=r'"bad.png"'):
            decode_image(io.BytesIO(content), "bad.png")
