"""What the measures of detail say of photographs that are changed in known ways, and what they cost.

    python benchmarks/detail.py

The photographs are the two of scikit-learn, of which each set holds 100 crops of 256 px. The sets but the reference
are the same crops: unchanged ("teacher"), blurred, sharpened, with a grid, and with noise.
"""

import time

import numpy as np
from absl import app, flags
from scipy import ndimage
from sklearn.datasets import load_sample_images

from dar_jax.evaluation import detail

COUNT = flags.DEFINE_integer("count", 100, "Crops in a set", lower_bound=2)
SIDE = 256


def crops(seed: int) -> np.ndarray:
    """uint8 [COUNT, SIDE, SIDE, 3], at random places."""
    rng, photographs, found = np.random.default_rng(seed), load_sample_images().images, []
    for _ in range(COUNT.value):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(0, side - SIDE) for side in photograph.shape[:2])
        found.append(photograph[top : top + SIDE, left : left + SIDE])
    return np.stack(found)


def changed(images: np.ndarray) -> dict[str, np.ndarray]:
    """Sets of the same images, float64, by name."""
    lines = np.arange(SIDE) % 8 == 0
    return {
        "teacher": images,
        "blur": ndimage.gaussian_filter(images, (0, 0.7, 0.7, 0)),
        "sharp": 2 * images - ndimage.gaussian_filter(images, (0, 1, 1, 0)),
        "grid": images + 2 * (lines[:, None] | lines)[..., None],
        "noise": images + np.random.default_rng(0).normal(0, 5, images.shape),
    }


def main(_):
    sets = {"reference": crops(0), **changed(np.float64(crops(1)))}
    start = time.perf_counter()
    measured = {
        name: detail.collect([detail.per_image(np.clip(np.round(x), 0, 255).astype(np.uint8))], (SIDE, SIDE))
        for name, x in sets.items()
    }
    each = (time.perf_counter() - start) / len(sets) / COUNT.value
    start = time.perf_counter()
    results = detail.compare(measured)
    print(detail.table([{"name": name, **result, "not_available": {}} for name, result in results.items()]))
    print(f"{1e3 * each:.2g} ms for each image, {time.perf_counter() - start:.2g} s for all comparisons")


if __name__ == "__main__":
    app.run(main)
