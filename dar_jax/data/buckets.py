"""Buckets: the few sizes of training images. Every image goes to the one of the nearest ratio of its sides."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dar_jax.errors import UserError

Size = tuple[int, int]  # height and width in pixels


def parse_buckets(names: Sequence[str], field: str) -> tuple[Size, ...]:
    """The sizes of "512x512", "448x576", height first.

    Args:
      names: the buckets.
      field: what they are called in an error.

    Raises:
      UserError: one is no size, or two have the same ratio.
    """
    sizes = {}
    for name in names:
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", str(name)):
            raise UserError(f'{field}: "{name}" is no size of height x width in pixels, as "448x576".')
        height, width = map(int, name.split("x"))
        if (other := sizes.setdefault(height / width, name)) != name:
            raise UserError(f'{field}: "{other}" and "{name}" have the same ratio; leave out one.')
    return tuple(tuple(map(int, name.split("x"))) for name in sizes.values())


def nearest(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """For each of `sizes`, int [N, 2], the number of the bucket of the nearest ratio, int [N].

    Ratios are compared by their logarithms. Of two that are equally near the first counts.
    """
    ratios, wanted = (np.log(np.divide(*np.asarray(shape, np.float64).T)) for shape in (sizes, buckets))
    return np.abs(ratios[:, None] - wanted).argmin(axis=1)


def assign(source: Any, buckets: Sequence[Size]) -> np.ndarray:
    """The number of the bucket of each image of a `sources.Source`, int [N]. It reads the head of every image file.

    Raises UserError if an image is damaged.
    """
    with ThreadPoolExecutor(min(4 * (os.cpu_count() or 1), 32)) as pool:
        sizes = list(pool.map(source.image_size, range(len(source))))
    return nearest(np.array(sizes), buckets)
