"""Tables, figure and page of a study, from the curves of its runs that are kept."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from study import Study


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of the mean, NaN of a single value."""
    count = len(values)
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count) if count > 1 else float("nan")
    return float(np.mean(values)), float(half)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method, in the same order."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def finals(curves: Mapping, name: str, metric: str) -> dict[str, float]:
    """The metric at the last step of each seed, of those seeds that have reached it."""
    last = str(max((max(map(int, steps)) for steps in curves.get(name, {}).values()), default=0))
    at_last = {seed: steps.get(last, {}) for seed, steps in curves.get(name, {}).items()}
    return {seed: values[metric] for seed, values in at_last.items() if metric in values}


def swept(study: Study, curves: Mapping, name: str) -> list[float]:
    """The first metric at the last step, of the seeds by which rates are chosen."""
    return [value for seed, value in finals(curves, name, study.metrics[0]).items() if study.sweeps(seed)]


def best_name(study: Study, curves: Mapping, cell: str) -> str:
    """The runs of a cell at its best rate: by the mean of the first metric over the sweep's seeds, at the last step."""
    means = {name: swept(study, curves, name) for name in study.names(cell)}
    return min(means, key=lambda name: np.mean(means[name]) if means[name] else np.inf)


def _paired(study: Study, curves: Mapping, a: str, b: str, metric: str) -> list[float]:
    left, right = (finals(curves, best_name(study, curves, cell), metric) for cell in (a, b))
    return [left[seed] - right[seed] for seed in left if seed in right]


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.4g} ± {half:.2g}" if len(values) > 1 else f"{mean:{sign}.4g}"


def table(study: Study, curves: Mapping) -> str:
    """Cells, each at its best rate, and paired differences at the last step, as Markdown."""
    rows = ["| cell | runs | " + " | ".join(study.metrics) + " |", "|---" * (2 + len(study.metrics)) + "|"]

    def row(name: str, values: list[list[float]], sign: str) -> None:
        cells = []
        for found in values:
            cells.append(_with_interval(found, sign) if found else "-")
        rows.append(f"| {name} | {len(values[0])} | " + " | ".join(cells) + " |")

    for cell in study.cells:
        name = best_name(study, curves, cell)
        row(f"`{name}`", [list(finals(curves, name, metric).values()) for metric in study.metrics], "")
    for a, b in study.differences:
        row(f"`{a}` - `{b}`", [_paired(study, curves, a, b, metric) for metric in study.metrics], "+")
    return "\n".join(rows)


def p_table(study: Study, curves: Mapping) -> str:
    """P-values of the differences of the first metric: of the paired t test, and by Holm's method, as Markdown."""
    found = {(a, b): _paired(study, curves, a, b, study.metrics[0]) for a, b in study.differences}
    p = {pair: float(stats.ttest_1samp(values, 0).pvalue) for pair, values in found.items() if len(values) > 1}
    rows = [f"| difference of {study.metrics[0]} | p | p by Holm |", "|---|---|---|"]
    for (pair, value), corrected in zip(p.items(), holm(list(p.values())), strict=True):
        rows.append(f"| `{pair[0]}` - `{pair[1]}` | {value:.2g} | {corrected:.2g} |")
    return "\n".join(rows)


def rate_table(study: Study, curves: Mapping) -> str:
    """The first metric at every learning rate, mean and interval over the seeds of the sweep, as Markdown."""
    rows = ["| cell | " + " | ".join(f"{rate:g}" for rate in study.all_rates()) + " |"]
    rows.append("|---" * (1 + len(study.all_rates())) + "|")
    for cell in study.cells:
        found = [swept(study, curves, name) for name in study.names(cell)]
        cells = [_with_interval(values) if values else "-" for values in found]
        rows.append(f"| `{cell}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def first_step(steps: Mapping, metric: str, target: float) -> float:
    """The first step at which a run is at most at the target, between evaluations by a line; inf if at none."""
    points = sorted((int(step), values[metric]) for step, values in steps.items() if metric in values)
    for i, (step, value) in enumerate(points):
        if value <= target:
            if i == 0:
                return step
            before, above = points[i - 1]
            return before + (step - before) * (above - target) / (above - value)
    return float("inf")


def target_table(study: Study, kept: Mapping) -> str:
    """Steps, and minutes at the median pace of the cell, until the targets, by the mean over the seeds, as Markdown.

    A cell with runs that never reach a target shows how many do instead.
    """
    curves, rows = kept["curves"], []
    rows.append(f"| cell | s per step | {' | '.join(f'{study.metrics[0]} {target:g}' for target in study.targets)} |")
    rows.append("|---" * (2 + len(study.targets)) + "|")
    for cell in study.cells:
        name, cells = best_name(study, curves, cell), []
        seconds = kept["pace"][cell] if "pace" in kept else list(kept["seconds"].get(name, {}).values())
        median = float(np.median(seconds or [np.nan]))
        for target in study.targets:
            found = [first_step(steps, study.metrics[0], target) for steps in curves.get(name, {}).values()]
            reached = [steps for steps in found if np.isfinite(steps)]
            if found and len(reached) == len(found):
                mean, half = interval(reached)
                spread = f" ± {half:.0f}" if len(reached) > 1 else ""
                cells.append(f"{mean:.0f}{spread} steps, {mean * median / 60:.1f} min")
            else:
                cells.append(f"{len(reached)} of {len(found)} runs")
        rows.append(f"| `{name}` | {median:.3g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def time_table(study: Study, kept: Mapping) -> str:
    """The first metric at equal steps and at equal time, as Markdown.

    The time is that which the quickest cell takes for all of its steps. What the others had reached by then lies on a
    line between two evaluations, which is fair only if the learning rate is constant. Differences are to the first
    cell, at equal time.
    """
    curves, metric, reference = kept["curves"], study.metrics[0], next(iter(study.cells))
    seconds = {cell: float(np.median(kept["pace"][cell])) for cell in study.cells}
    names = {cell: best_name(study, curves, cell) for cell in study.cells}
    names = {cell: name for cell, name in names.items() if name in curves}
    last = {cell: max(max(map(int, steps)) for steps in curves[name].values()) for cell, name in names.items()}
    budget = min(last[cell] * seconds[cell] for cell in names)

    def at(cell: str, step: float) -> dict[str, float]:
        reached = {}
        for seed, steps in curves[names[cell]].items():
            points = sorted((int(s), values[metric]) for s, values in steps.items() if metric in values)
            if points[-1][0] == last[cell]:
                reached[seed] = float(np.interp(step, *zip(*points, strict=True)))
        return reached

    rows = [f"| cell | ms per step | ratio | {metric} at step {last[reference]} | after {budget:.0f} s | difference |"]
    rows.append("|---" * 6 + "|")
    first = at(reference, budget / seconds[reference])
    for cell in names:
        then = at(cell, budget / seconds[cell])
        difference = [then[seed] - first[seed] for seed in then if seed in first]
        found = _with_interval(list(at(cell, last[cell]).values())), _with_interval(list(then.values()))
        ratio = f"{1e3 * seconds[cell]:.0f} | {seconds[cell] / seconds[reference]:.2f}"
        rows.append(f"| `{cell}` | {ratio} | {' | '.join(found)} | {_with_interval(difference, '+')} |")
    return "\n".join(rows)


def all_tables(study: Study, kept: Mapping) -> list[str]:
    """All tables of a study, in Markdown, and the runs that failed."""
    found = [table(study, kept["curves"])]
    if len(study.differences) > 1:
        found.append(p_table(study, kept["curves"]))
    if study.rates:
        found.append(rate_table(study, kept["curves"]))
    if study.targets:
        found.append(target_table(study, kept))
    if "pace" in kept:
        found += [f"Steps timed on {kept.get('paced_on', 'a machine that was not named')}", time_table(study, kept)]
    for which in ("failed", "unfinished"):
        if kept.get(which):
            found.append(f"{which.capitalize()}: {', '.join(kept[which])}")
    return found


def draw(study: Study, curves: Mapping, path: pathlib.Path) -> None:
    """A panel for each metric: means of the cells over the steps, or a line of baselines, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(study.metrics), figsize=(5.5 * len(study.metrics), 4), layout="constrained")
    for axis, metric in zip(np.atleast_1d(axes), study.metrics, strict=True):
        for i, (cell, steps, mean, half) in enumerate(_points(study, curves, metric)):
            if cell in study.baselines:
                axis.axhline(mean[-1], color=f"C{i}", label=cell, linestyle="--")
                continue
            axis.plot(steps, mean, color=f"C{i}", label=cell, marker="o", markersize=3)
            axis.fill_between(steps, mean - half, mean + half, color=f"C{i}", alpha=0.12, linewidth=0)
        axis.set(xlabel="step", ylabel=metric)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _points(study: Study, curves: Mapping, metric: str) -> Iterator[tuple[str, list[int], np.ndarray, np.ndarray]]:
    """Of each cell the steps at which all seeds have the metric, its mean and half its interval there."""
    for cell in study.cells:
        seeds = list(curves.get(best_name(study, curves, cell), {}).values())
        steps = [s for s in (seeds[0] if seeds else ()) if all(metric in one.get(s, {}) for one in seeds)]
        if steps := sorted(map(int, steps)):
            points = [interval([one[str(step)][metric] for one in seeds]) for step in steps]
            yield cell, steps, *np.array(points).T


def page(study: Study, tables: Sequence[str], figure: bytes) -> str:
    """One HTML page with the tables and the figure."""
    body = []
    for text in tables:
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if not line.startswith("|---")]
        cells = ("".join(f"<td>{html.escape(cell.replace('`', ''))}</td>" for cell in line) for line in lines)
        body.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    image = f'<img src="data:image/png;base64,{base64.b64encode(figure).decode()}" style="max-width: 100%">'
    style = "body {font: 14px sans-serif; margin: 2em} td {padding: .2em .8em} table {margin: 1em 0}"
    return f"<!doctype html><meta charset=utf-8><title>{study.name}</title><style>{style}</style>" + (
        f"<h1>{study.name}</h1>{''.join(body)}{image}"
    )
