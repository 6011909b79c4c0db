"""One picture of many images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dar_jax import files

GAP = 2  # pixels of the picture between two images
CAPTION_LINES, LINE, CAPTION_WIDTH = 3, 12, 120  # pixels of a line, and of an image that has a caption, at least


def save_grid(
    path: files.Path,
    images: np.ndarray,
    columns: int,
    *,
    captions: Sequence[str] | None = None,
    min_side: int = 512,
) -> None:
    """Writes images uint8 [N, H, W, C], C = 1 (grey) or 3 (RGB), as one PNG, row by row from the top left.

    Every pixel becomes a square of f x f pixels, f the smallest whole number that makes the longer side of
    the picture at least `min_side` pixels, so that 8 x 8 images can be read. White shows in the gaps and
    after the last image. `captions`, one for each image, are printed below them in at most three lines. The file
    appears whole or not at all.

    Raises:
      ValueError: the images are not uint8, there are none, C is neither 1 nor 3, or columns < 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[3] not in (1, 3) or columns < 1:
        raise ValueError(
            f"a grid takes uint8 images [N >= 1, H, W, 1 or 3] in at least one column, "
            f"not {images.dtype} {list(images.shape)} in {columns}."
        )
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sides = ((rows, height), (columns, width))
    factor = max(1, min(-(-(min_side - GAP * (number - 1)) // (number * side)) for number, side in sides))
    factor = max(factor, -(-CAPTION_WIDTH // width)) if captions else factor
    height, width = factor * height, factor * width
    pitch = height + GAP + (CAPTION_LINES * LINE if captions else 0)
    canvas = np.full((rows * pitch - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    places = [((i % columns) * (width + GAP), (i // columns) * pitch) for i in range(count)]
    for image, (left, top) in zip(images, places, strict=True):
        canvas[top : top + height, left : left + width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    for caption, (left, top) in zip(captions or (), places, strict=bool(captions)):
        _write_caption(picture, caption, left, top + height, width)
    files.path(path).parent.mkdir(exist_ok=True)  # no parents: a workdir that was removed stays so
    with files.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _write_caption(picture: Image.Image, caption: str, left: int, top: int, width: int) -> None:
    """Writes a caption in black from (left, top) down in lines of at most `width` pixels; what is left out is a …"""
    font, lines = ImageFont.load_default(LINE - 2), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} …"]
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((left, top + i * LINE), line, fill=0, font=font)
