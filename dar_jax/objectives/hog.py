"""Histograms of oriented gradients: features of image patches that need no weights (Dalal and Triggs 2005)."""

import jax.numpy as jnp
import numpy as np
from jax import Array

BINS = 9  # of unsigned orientations, over 180 degrees
WIDTH = 9 * BINS  # of the features: the histograms of a cell and of its eight neighbours
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
EPSILON = 1e-3


def neighbourhood(x: Array) -> Array:
    """The 3x3 entries around each of a grid, row by row, zero outside of it: `[B, N, M, C]` -> `[B, N, M, 9 C]`."""
    _, rows, columns, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=-1)


def hog(images: Array, grid: int) -> Array:
    """Features of the grid * grid cells of images `[B, H, W, 1 or 3]` in [-1, 1] -> float32 `[B, grid * grid, 81]`.

    The gradient of the luma is the central difference, zero at the border. Each pixel votes with its magnitude for the
    two orientations next to its own, linearly. A feature joins the histograms of the 3x3 cells around its own, zero
    outside of the image, over their norm. H and W must be multiples of `grid`.
    """
    b, height, width, channels = images.shape
    luma = (images @ LUMA if channels == 3 else images[..., 0]).astype(jnp.float32)
    rows = jnp.pad(luma[:, 2:] - luma[:, :-2], ((0, 0), (1, 1), (0, 0)))
    columns = jnp.pad(luma[:, :, 2:] - luma[:, :, :-2], ((0, 0), (0, 0), (1, 1)))
    magnitude = jnp.hypot(rows, columns)
    place = jnp.arctan2(rows, columns) / jnp.pi * BINS - 0.5  # of the orientation among the centres of the bins
    away = (place[..., None] - jnp.arange(BINS) + BINS / 2) % BINS - BINS / 2  # from every centre, around the circle
    # No orientation is rounded to a bin: a gradient straight down lies on a centre, and may come out on either side.
    votes = magnitude[..., None] * jnp.maximum(0, 1 - jnp.abs(away))

    cells = votes.reshape(b, grid, height // grid, grid, width // grid, BINS).mean(axis=(2, 4))
    joined = neighbourhood(cells).reshape(b, grid * grid, WIDTH)
    return joined / jnp.sqrt(jnp.sum(jnp.square(joined), axis=-1, keepdims=True) + EPSILON**2)
