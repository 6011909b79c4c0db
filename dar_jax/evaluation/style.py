"""How our figures look, as a paper would print them: PNG and PDF, legible in grey."""

from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from dar_jax import files

DPI = 200
WIDTH = 7.0  # inches, both columns of a paper
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": DPI,
}


def save(plot: Callable[[], Figure], png: files.Path) -> tuple[files.Path, files.Path]:
    """Draws a figure in this style to `png`, and beside it as .pdf. Returns both paths; each file appears whole."""
    paths = png, png.with_suffix(".pdf")
    with matplotlib.rc_context(STYLE):
        figure = plot()
        for path in paths:
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:])
    return paths
