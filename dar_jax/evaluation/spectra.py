"""The figure of detail: the power spectrum of every set of images, and its ratio to the reference."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dar_jax.evaluation.style import LINES, WIDTH


def draw(results: list[dict]) -> Figure:
    """Power above, ratio to the reference in dB below, by frequency over Nyquist; the thirds of Nyquist are marked.

    Shaded is the 95 % interval of a ratio; around the reference, what chance alone gives.

    Args:
      results: of `detail.compare`, each with its "name"; the first is the reference.
    """
    figure = Figure(figsize=(WIDTH * 0.6, 4.6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, result in enumerate(results):
        shade = 0.85 * (i - 1) / max(len(results) - 1, 1)
        color = matplotlib.colormaps["viridis"](shade) if i else "0.5"
        frequency, line = result["frequency"], {"color": color, "linestyle": LINES[i % len(LINES)]}
        above.plot(frequency, result["power"], label=result["name"], **line)
        below.plot(frequency, result["ratio_db"], **line)
        low, high = np.array(result["ratio_db_interval"])
        below.fill_between(frequency, low, high, color=color, alpha=0.2, linewidth=0)
    for ax in (above, below):
        for third in (1 / 3, 2 / 3):
            ax.axvline(third, color="0.3", linestyle=":", linewidth=0.8)
    above.set_yscale("log")
    above.set_ylabel("power $|F|^2$ / pixels")
    below.set_xlabel("frequency / Nyquist (1 = half a cycle per pixel)")
    below.set_ylabel("power over reference (dB)")
    above.legend()
    return figure
