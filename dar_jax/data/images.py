"""Single images: decoding, channels, ADM's centre crop, and the range [-1, 1]."""

from typing import BinaryIO

import numpy as np
from PIL import Image

from dar_jax.errors import UserError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode_image(file: str | BinaryIO, name: str) -> np.ndarray:
    """Decodes any 8-bit format PIL knows.

    Grey images (also bilevel or with alpha) become one channel, all others RGB; alpha is dropped.

    Args:
      file: a path or an open binary file.
      name: what to call it in an error.

    Returns:
      uint8 [h, w, c], c = 1 or 3.

    Raises:
      UserError: the bytes are missing, damaged, no image, or have more than 8 bits per channel.
    """
    try:
        with Image.open(file) as image:
            if ";16" in str(getattr(image, "tile", "")) or image.mode.startswith(
                ("I", "F")
            ):  # PIL would cut or clip these
                raise ValueError(f"{image.mode} of more than 8 bits per channel; save it with 8")
            grey = Image.getmodebase(image.mode) == "L"
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except Exception as error:  # damaged bytes make PIL's decoders raise almost anything
        raise UserError(f'image "{name}" cannot be read ({error}); repair or remove it.') from error
    return pixels[..., None] if grey else pixels


def image_size(file: str | BinaryIO, name: str) -> tuple[int, int]:
    """Height and width of an image, which is not decoded. Raises UserError if its head is missing or damaged."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:  # as in `decode_image`
        raise UserError(f'image "{name}" cannot be read ({error}); repair or remove it.') from error


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts uint8 [h, w, 1 or 3] to [h, w, channels]: grey is repeated, RGB becomes luma (ITU-R 601)."""
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def _resize_to_cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    shape = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    return np.asarray(picture.resize(shape, Image.Resampling.BICUBIC)).reshape(shape[1], shape[0], -1)


def center_crop(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Scales an image until it just covers `size` and cuts out the middle, as ADM and its successors prepare ImageNet.

    A box filter halves the image while it is at least twice as large, a bicubic filter does the rest (Dhariwal and
    Nichol 2021, arXiv:2105.05233, for squares). An image of the right size comes back bit for bit.

    Args:
      image: uint8 [h, w, c], c = 1 or 3.
      size: pixels, height and width of the result; a number for a square.

    Returns:
      uint8 [*size, c].
    """
    height, width = (size, size) if isinstance(size, int) else size
    if max(height / image.shape[0], width / image.shape[1]) != 1:
        image = _resize_to_cover(image, height, width)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def to_float(image: np.ndarray) -> np.ndarray:
    """Maps uint8 0..255 to float32 in [-1, 1]: x / 127.5 - 1. Any shape."""
    return image.astype(np.float32) / 127.5 - 1


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Maps floats to uint8: clamp(127.5 x + 128, 0, 255), truncated. The inverse of `to_float`; any shape."""
    return np.clip(127.5 * np.asarray(image, np.float32) + 128, 0, 255).astype(np.uint8)
