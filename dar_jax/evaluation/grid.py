"""One picture of many images."""

import numpy as np
from PIL import Image

from dar_jax import files

GAP = 2  # pixels of the picture between two images


def save_grid(path: files.Path, images: np.ndarray, columns: int, *, min_side: int = 512) -> None:
    """Writes images uint8 [N, H, W, C], C = 1 (grey) or 3 (RGB), as one PNG, row by row from the top left.

    Every pixel becomes a square of f x f pixels, f the smallest whole number that makes the longer side of
    the picture at least `min_side` pixels, so that 8 x 8 images can be read. White shows in the gaps and
    after the last image. The file appears whole or not at all.

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
    height, width = factor * height, factor * width
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    files.path(path).parent.mkdir(exist_ok=True)  # no parents: a workdir that was removed stays so
    with files.replacing(path) as temporary:
        Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(temporary, format="PNG")
