"""Every pixel of the grid where it belongs, against Pillow's own cropping and nearest-neighbour resizing."""

import numpy as np
import pytest
from PIL import Image

from dar_jax.evaluation.grid import save_grid

GAP = 2


@pytest.mark.parametrize(
    ("count", "height", "width", "channels", "columns", "min_side", "factor"),
    [
        (10, 8, 8, 1, 10, 512, 7),  # one row: the long side counts
        (7, 8, 8, 1, 3, 512, 22),  # 3 * 22 * 8 + 2 * 2 = 532, at 21 it would be 508
        (4, 5, 9, 3, 2, 100, 6),
        (4, 64, 64, 3, 2, 130, 1),  # exactly 130 without enlarging
        (4, 64, 64, 3, 2, 131, 2),
        (2, 80, 80, 1, 1, 10, 1),
    ],
)
def test_pixels(tmp_path, count, height, width, channels, columns, min_side, factor):
    images = np.random.default_rng(0).integers(0, 255, (count, height, width, channels)).astype(np.uint8)
    save_grid(tmp_path / "new" / "grid.png", images, columns, min_side=min_side)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["grid.png"]
    picture = Image.open(tmp_path / "new" / "grid.png")
    rows = (count + columns - 1) // columns
    tile_width, tile_height = factor * width, factor * height
    assert picture.format == "PNG"
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert picture.size == (columns * tile_width + GAP * (columns - 1), rows * tile_height + GAP * (rows - 1))
    for i, image in enumerate(images):
        left, top = i % columns * (tile_width + GAP), i // columns * (tile_height + GAP)
        got = picture.crop((left, top, left + tile_width, top + tile_height))
        expected = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        np.testing.assert_array_equal(got, expected.resize((tile_width, tile_height), Image.Resampling.NEAREST))
    white = np.sum(np.all(np.array(picture).reshape(*picture.size[::-1], channels) == 255, axis=-1))
    assert white == picture.size[0] * picture.size[1] - count * tile_width * tile_height


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, np.zeros((1, 8, 8, 1), np.uint8), 1)
    before = path.read_bytes()

    def fail(image, file, **_):
        file.write_bytes(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(path, np.ones((1, 8, 8, 1), np.uint8), 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("images", "columns"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), 2),
        (np.zeros((4, 8, 8), np.uint8), 2),
        (np.zeros((4, 8, 8, 4), np.uint8), 2),
        (np.zeros((0, 8, 8, 1), np.uint8), 2),
        (np.zeros((4, 8, 8, 1), np.uint8), 0),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, images, columns):
    with pytest.raises(ValueError, match="a grid takes uint8 images"):
        save_grid(tmp_path / "grid.png", images, columns)
    assert not list(tmp_path.iterdir())
