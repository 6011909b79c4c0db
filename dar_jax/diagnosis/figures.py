"""The figures of a diagnosis, as a paper would print them: PNG and PDF, legible in grey."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dar_jax import files
from dar_jax.diagnosis.probes import over_times, relative_entropy
from dar_jax.evaluation import style
from dar_jax.evaluation.style import LINES, WIDTH

MAX_TIMES = 5  # curves in one panel
READER = "reader (sublayers, then the head)"
MARKERS = ("o", "s", "^", "D", "v")
CURVES = (
    ("forward_rms", "RMS of the state $z_k$", True),
    ("backward_rms", "RMS of $\\partial$Loss/$\\partial z_k$", True),
    ("similarity", "cosine of $z_k$ and $z_{k+1}$", False),
    ("alignment", "CKA of $z_k$ and the target", False),
)


class Figure(NamedTuple):
    """A figure on disk.

    Attributes:
      name: what its files are called.
      title: a line that says what it shows.
      caption: how to read it.
      owner: which of the compared runs it is of; None: of all.
      paths: its PNG and its PDF.
    """

    name: str
    title: str
    caption: str
    owner: int | None
    paths: tuple[files.Path, files.Path]


def draw(results: Sequence[dict], folder: files.Path) -> list[Figure]:
    """Draws all figures of the results of `jobs.diagnose` into `folder`."""
    figures = []
    names = labels(results)

    def save(name: str, title: str, caption: str, owner: int | None, plot: Callable[[], Canvas]) -> None:
        name = name if owner is None else f"{name}_{names[owner]}"
        figures.append(Figure(name, title, caption, owner, style.save(plot, folder / f"{name}.png")))

    save(
        "curves",
        "Magnitude, gradient and similarity by depth",
        "z_k is what block k hands on. Lines: over all times (root mean square; mean of cosines). Shaded: the range "
        "over the times. Loss is the velocity MSE of one example. The target, if there is one, is that of config.repa: "
        "its linear CKA with a state over the tokens of an image is 1 where both see the same tokens as alike.",
        None,
        lambda: _curves(results, names),
    )
    save(
        "probe",
        "How well t can be read off each state",
        "R² of a ridge regression of t on the state a sublayer reads (mean over tokens), on pairs of image and noise "
        "it was not fitted to. Grey: the same from the patches of x_t.",
        None,
        lambda: _probe(results, names),
    )
    for owner, result in enumerate(results):
        save(
            "by_time",
            "These curves at single times",
            "t = 0 is noise, t = 1 data.",
            owner,
            lambda: _by_time(result),  # noqa: B023
        )
        shares, what = _shares(result)
        is_routed = "weights" in result
        meaning = (
            "Mean weight of each source over images and tokens."
            if is_routed
            else "Importance |dLoss/dg| of a gate g = 1 in front of each source, mean over images, as a share of the "
            "sum over the sources of a reader. The model has no such gates: all are 1."
        )
        numbering = " Source 0 is the embedded input, source i the output of sublayer i"
        numbering += " or the summary of the chunk that ends there." if is_routed else "."
        save(
            "depth",
            "Which sources each reader draws on",
            meaning
            + " Over all times."
            + numbering
            + " Right: the entropy of "
            + ("the weights of a token, mean over images and tokens" if is_routed else "the shares")
            + "; 1 is uniform.",
            owner,
            lambda: _depth(result, shares, what),  # noqa: B023
        )
        save(
            "sources",
            "Sources by time, for every reader",
            meaning + numbering,
            owner,
            lambda: _sources(result, shares, what),  # noqa: B023
        )
        if "canonical" in result:
            save(
                "canonical",
                "Loss with frozen routing",
                "Weights fixed to their mean over images and tokens at each time (content-blind), and over all times "
                "(canonical); relative to the routed model.",
                owner,
                lambda: _canonical(result),  # noqa: B023
            )
        if "ablations" in result:
            save(
                "ablations",
                "Loss without a part of routing",
                "Mean over the times, relative to the routed model. Points: no reader sees the source (0 is the "
                "embedded input), unless it sees nothing else. Line: the queries see the time of another pair.",
                owner,
                lambda: _ablations(result),  # noqa: B023
            )
    return figures


def labels(results: Sequence[dict]) -> list[str]:
    """A short name for each run: the last part of its workdir, numbered if two are alike."""
    names = [files.path(result["workdir"]).name for result in results]
    return names if len(set(names)) == len(names) else [f"{name}_{i}" for i, name in enumerate(names, start=1)]


def _line(i: int, shade: float) -> dict:
    return {"linestyle": LINES[i % 5], "marker": MARKERS[i % 5], "color": matplotlib.colormaps["viridis"](shade)}


def _block_axis(ax: Axes, y: str, is_log: bool) -> None:
    ax.set_xlabel("block $k$")
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if is_log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def _with_legend(canvas: Canvas, ax: Axes) -> Canvas:
    """The labels of `ax` above all panels, where they cover nothing."""
    handles, names = ax.get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return canvas


def _curves(results, names) -> Canvas:
    chosen = [curve for curve in CURVES if all(curve[0] in result for result in results)]
    canvas = Canvas(figsize=(WIDTH, 2.3))
    for ax, (name, y, is_log) in zip(canvas.subplots(1, len(chosen)), chosen, strict=True):
        for i, (result, label) in enumerate(zip(results, names, strict=True)):
            blocks, line = np.arange(1, result[name].shape[1] + 1), _line(i, 0.7 * i)
            ax.plot(blocks, over_times(result, name), label=label, **line)
            low, high = result[name].min(axis=0), result[name].max(axis=0)
            ax.fill_between(blocks, low, high, color=line["color"], alpha=0.15, linewidth=0)
        _block_axis(ax, y, is_log)
    return _with_legend(canvas, ax)


def _some_times(result: dict) -> np.ndarray:
    count = len(result["timesteps"])
    return np.unique(np.linspace(0, count - 1, min(count, MAX_TIMES)).round().astype(int))


def _by_time(result) -> Canvas:
    canvas, times = Canvas(figsize=(WIDTH, 2.3)), _some_times(result)
    chosen = [curve for curve in CURVES if curve[0] in result]
    for ax, (name, y, is_log) in zip(canvas.subplots(1, len(chosen)), chosen, strict=True):
        for i, at in enumerate(times):
            curve = result[name][at]
            line = _line(i, 0.9 * i / len(times))
            ax.plot(np.arange(1, len(curve) + 1), curve, label=f"$t$ = {result['timesteps'][at]:.2g}", **line)
        _block_axis(ax, y, is_log)
    return _with_legend(canvas, ax)


def _probe(results, names) -> Canvas:
    canvas = Canvas(figsize=(WIDTH / 2, 2.4))
    ax = canvas.subplots()
    for i, (result, label) in enumerate(zip(results, names, strict=True)):
        line = _line(i, 0.7 * i)
        ax.plot(np.arange(1, len(result["probe_r2"]) + 1), result["probe_r2"], label=label, **line)
    ax.axhline(results[0]["probe_r2_x_t"], color="0.5", linestyle=":", label="$x_t$")
    ax.set_xlabel(READER)
    ax.set_ylabel("$R^2$ of $t$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _with_legend(canvas, ax)


def _shares(result: dict) -> tuple[np.ndarray, str]:
    """What sources count for readers `[times, A, A]`, NaN for what is no source, and what to call it."""
    if "weights" in result:
        return np.where(result["is_source"], result["weights"], np.nan), "mean weight"
    importance = result["gate_gradient_abs"]
    shares = importance / np.maximum(importance.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.where(result["is_source"], shares, np.nan), "share of gate importance"


def reader_names(count: int) -> list[str]:
    """Names of the A readers: attention and MLP of every block, and the head."""
    return [f"{'attention' if l % 2 else 'MLP'} {(l + 1) // 2}" for l in range(1, count)] + ["head"]


def _depth(result, shares, what) -> Canvas:
    canvas = Canvas(figsize=(WIDTH, 3.0))
    left, right = canvas.subplots(1, 2)
    count, mean = shares.shape[1], shares.mean(axis=0)
    extent = (-0.5, count - 0.5, 0.5, count + 0.5)
    image = left.imshow(mean, origin="lower", vmin=0, vmax=_limit(mean), cmap="viridis", extent=extent)
    left.grid(False)
    left.set_xlabel("source (0 = input)")
    left.set_ylabel(READER)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    canvas.colorbar(image, ax=left, label=f"{what}, over all $t$")

    if "entropy" in result:
        entropy = result["relative_entropy"]
    else:
        logs = np.log(np.where(shares > 0, shares, 1))
        entropy = relative_entropy(-np.nansum(shares * logs, axis=-1), result["is_source"])
    several = np.flatnonzero(result["is_source"].sum(axis=1) > 1)
    chosen = _some_times(result)
    for i, at in enumerate(chosen):
        label = f"$t$ = {result['timesteps'][at]:.2g}"
        right.plot(several + 1, entropy[at, several], label=label, **_line(i, 0.9 * i / len(chosen)))
    right.set_xlabel(READER)
    right.set_ylabel("entropy / log(number of sources)")
    return _with_legend(canvas, right)


def _limit(shares: np.ndarray) -> float:
    """The largest share of a reader that has a choice."""
    return float(np.nanmax(np.where(np.isfinite(shares).sum(axis=-1, keepdims=True) > 1, shares, np.nan)))


def _sources(result, shares, what) -> Canvas:
    times, count = result["timesteps"], shares.shape[1]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = Canvas(figsize=(WIDTH, 0.4 + WIDTH / columns * rows))
    grid = canvas.subplots(rows, columns, squeeze=False)
    small = 8 if columns < 6 else 6
    for l, (ax, name) in enumerate(zip(grid.flat, reader_names(count), strict=False)):
        sources = np.flatnonzero(np.isfinite(shares[0, l]))
        image = ax.imshow(shares[:, l, sources].T, origin="lower", aspect="auto", interpolation="nearest", vmin=0,
                          vmax=_limit(shares), cmap="viridis")  # fmt: skip
        ax.grid(False)
        ax.set_title(name, fontsize=small, pad=2)
        ticks = np.unique(np.linspace(0, len(sources) - 1, min(len(sources), 4)).round().astype(int))
        ax.set_yticks(ticks, sources[ticks], fontsize=small - 1)
        ax.set_xticks([0, len(times) - 1], [f"{times[0]:.2g}", f"{times[-1]:.2g}"], fontsize=small - 1)
        ax.tick_params(length=2, pad=1)
    for ax in list(grid.flat)[count:]:
        ax.set_axis_off()
    canvas.colorbar(image, ax=grid, label=what, shrink=0.6)
    canvas.supxlabel("$t$ (0 = noise, 1 = data)", fontsize=8)
    canvas.supylabel("source (0 = input)", fontsize=8)
    return canvas


def _canonical(result) -> Canvas:
    canvas = Canvas(figsize=(WIDTH / 2, 2.4))
    ax = canvas.subplots()
    for i, (name, label) in enumerate((("loss_content_blind", "content-blind"), ("loss", "canonical"))):
        ratio = result["canonical"][name] / result["loss"]
        ax.plot(result["timesteps"], ratio, label=label, **_line(i, 0.7 * i))
    ax.axhline(1, color="0.5", linestyle=":", label="routed")
    ax.set_xlabel("$t$ (0 = noise, 1 = data)")
    ax.set_ylabel("loss / loss of the routed model")
    return _with_legend(canvas, ax)


def _ablations(result) -> Canvas:
    canvas = Canvas(figsize=(WIDTH / 2, 2.4))
    ax, found, whole = canvas.subplots(), result["ablations"], result["loss"].mean()
    ax.plot(found["sources"], found["loss_without"].mean(axis=0) / whole, "o", markersize=3, label="without a source")
    ax.axhline(found["loss_shuffled_t"].mean() / whole, color="C1", linestyle="--", label="shuffled t in the queries")
    ax.axhline(1, color="0.5", linestyle=":", label="routed")
    ax.set_xlabel("source (0 = input)")
    ax.set_ylabel("loss / loss of the routed model")
    return _with_legend(canvas, ax)
