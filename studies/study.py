"""A study: several configs with the same seeds, run one after the other, then tables and a figure with intervals.

A study is a file that declares a `Study` and calls `main`. It is run from the root of a clone, can be stopped at any
time, and goes on with the same command:

    python studies/repa.py --root=runs/repa             # trains what is missing, then collects and draws
    python studies/repa.py --root=runs/repa --jobs=2    # two seeds at a time, each on half of the cores
    python studies/repa.py --root=runs/repa --train=0   # collects and draws what is there
    python studies/repa.py --pace=10                    # times the steps of all cells, which take turns

Seeds are paired: runs of one seed see the same data in the same order. Intervals are of Student's t over the seeds.
A run that fails is listed, and the others go on. Loss at equal time needs --pace, on a machine that does nothing else:
the logs of runs also tell how long a step took, but not what else the machine did. Curves of all runs are kept in
studies/<name>.json, from which tables and figure can be made again; with --root a page with all of them is written
there, <name>.html.
"""

import base64
import concurrent.futures
import html
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
from absl import app, flags
from scipy import stats

ROOT = flags.DEFINE_string("root", None, "Where the runs are; without it the curves of studies/<name>.json are used")
TRAIN = flags.DEFINE_bool("train", True, "Train what is missing")
PACE = flags.DEFINE_integer("pace", 0, "Rounds in which the cells take turns for ten steps each, and are timed", 0)
JOBS = flags.DEFINE_integer("jobs", 1, "Seeds at a time, each on its share of the cores", lower_bound=1)
STUDIES = pathlib.Path(__file__).parent
DETAIL_SAMPLES = 1024


class Study(NamedTuple):
    """What is compared.

    Attributes:
      name: of the study and its files.
      config: of all runs, as `configs/fashion_mnist.py`.
      cells: the variants to compare by name: that of the config, then flags. In flags {root} is the directory of the
        runs and {seed} the seed, so that a run may start from one of an earlier cell, {root}/teacher_{seed}.
      shared: flags of all runs.
      seeds: one run of every cell each.
      differences: pairs of cells (a, b), whose metrics are subtracted, a - b, seed by seed.
      metrics: what is compared, of metrics.jsonl and of `detail`; lower is better but for accuracies. By the first one
        a learning rate is chosen, and p-values are of its differences.
      rates: learning rates at which every cell is trained; () takes that of the config. The tables show each cell at
        the rate whose mean over the seeds is best, and the whole sweep.
      further_rates: lower and higher ones. A cell whose best rate is at the end of those that it has tried goes on to
        the next.
      sweep_seeds: seeds at which rates are tried, and by which one is chosen; the other seeds run at that rate alone.
        () takes all seeds.
      targets: of the first metric, fixed beforehand: how many steps, and how much time, a run takes to reach them.
      baselines: cells that are no training to look at; the figure has a line at their last value.
      detail: cell whose samples the fine detail of all others is compared with, image by image (docs/detail.md). Its
        measures are metrics of the last step: "hf_half", "lsd_high", "lsd_high_teacher" and so on.
    """

    name: str
    config: str
    cells: dict[str, Sequence[str]]
    shared: Sequence[str]
    seeds: Sequence[int]
    differences: Sequence[tuple[str, str]]
    metrics: Sequence[str] = ("val_loss", "fd_convnet")
    rates: Sequence[float] = ()
    further_rates: Sequence[float] = ()
    sweep_seeds: Sequence[int] = ()
    targets: Sequence[float] = ()
    baselines: Sequence[str] = ()
    detail: str = ""

    def all_rates(self) -> list[float]:
        return sorted([*self.rates, *self.further_rates])

    def names(self, cell: str) -> list[str]:
        """What the runs of a cell are called, but for the seed: one name for each rate."""
        return [f"{cell}@{rate:g}" for rate in self.all_rates()] or [cell]

    def sweeps(self, seed: int | str) -> bool:
        """Whether the runs of a seed have a say in which rate is best."""
        return not self.sweep_seeds or int(seed) in self.sweep_seeds


def main(study: Study) -> None:
    """The whole program of a study."""

    def run(_):
        path, failed = STUDIES / f"{study.name}.json", []
        if ROOT.value:
            root = pathlib.Path(ROOT.value)
            failed = train(study, root, JOBS.value) if TRAIN.value else []
            path.write_text(json.dumps(_kept(path, "pace") | collect(study, root, failed), indent=1) + "\n")
        if PACE.value:
            path.write_text(json.dumps(_kept(path) | {"pace": pace(study, PACE.value)}, indent=1) + "\n")
        if not path.exists():
            sys.exit(f"error: {path} is not there; name the directory of the runs with --root.")
        kept = json.loads(path.read_text())
        tables = all_tables(study, kept)
        print("\n\n".join(tables))
        figure = STUDIES.parent / "docs" / f"study_{study.name}.png"
        draw(study, kept["curves"], figure)
        if ROOT.value:
            draw(study, kept["curves"], root / f"{study.name}.pdf")
            (root / f"{study.name}.html").write_text(page(study, tables, figure.read_bytes()))
        if failed:
            sys.exit(f"error: {len(failed)} runs failed; see the log.txt of {', '.join(failed)} in {root}.")

    app.run(run)


def _kept(path: pathlib.Path, *names: str) -> dict:
    """What is kept of a study, or those parts of it."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {name: value for name, value in kept.items() if name in names or not names}


def train(study: Study, root: pathlib.Path, jobs: int = 1) -> list[str]:
    """Trains all runs, seed by seed, so that whole pairs come first. A finished run takes seconds.

    Rates are tried first, with the seeds of the sweep, and further ones until the best is inside.

    Returns the names of the runs that failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    stopped = threading.Event()
    shares, failed = {seed: cores[i % jobs :: jobs] for i, seed in enumerate(study.seeds)}, []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:

            def run(cells: dict[str, list[str]], sweeps: bool) -> dict:
                seeds = [seed for seed in study.seeds if study.sweeps(seed) == sweeps]
                running = [pool.submit(_train_seed, study, cells, root, s, shares[s], stopped) for s in seeds]
                failed.extend(name for job in running for name in job.result())
                return collect(study, root)["curves"]

            tried = {cell: [f"{cell}@{rate:g}" for rate in study.rates] or [cell] for cell in study.cells}
            cells = dict(tried)
            while cells:
                curves = run(cells, sweeps=True)
                cells = {cell: further for cell in cells if (further := _further(study, curves, cell, tried[cell]))}
                for cell, further in cells.items():
                    tried[cell] += further
            run({cell: [best_name(study, curves, cell)] for cell in study.cells}, sweeps=False)
            return failed
        finally:  # Ctrl-C reaches the runs too, which save and end
            stopped.set()


def _further(study: Study, curves: Mapping, cell: str, tried: Sequence[str]) -> list[str]:
    """The rate beside the best one of those tried, if that is at their end and there is one."""
    names = study.names(cell)
    best, places = names.index(best_name(study, curves, cell)), [names.index(name) for name in tried]
    beside = {min(places): min(places) - 1, max(places): max(places) + 1}.get(best, -1)
    return names[beside : beside + 1] if beside >= 0 and names[best] in curves else []


def _train_seed(
    study: Study,
    cells: Mapping[str, Sequence[str]],
    root: pathlib.Path,
    seed: int,
    cores: Sequence[int],
    stopped: threading.Event,
) -> list[str]:
    """Trains those runs of a seed that `cells` names, and returns the names of those that failed."""
    failed, network = [], root / "convnet.npz"  # of fd_convnet: it depends on the data alone
    for cell, (variant, *own) in study.cells.items():
        own = [flag.format(root=root, seed=seed) for flag in own]
        for name, rate in zip(study.names(cell), study.all_rates() or (None,), strict=True):
            if name not in cells.get(cell, ()):
                continue
            if stopped.is_set():
                return failed
            workdir = root / f"{name}_{seed}"
            workdir.mkdir(exist_ok=True)
            if network.exists() and not (workdir / network.name).exists():
                shutil.copy(network, workdir)
            command = [sys.executable, "-m", "dar_jax.main", f"--config={study.config}:{variant}"]
            command += [f"--workdir={workdir}", f"--config.seed={seed}", *study.shared, *own]
            command += [f"--config.optimizer.learning_rate={rate}"] if rate else []
            print(f"{name}, seed {seed}", flush=True)
            code = _run(command, workdir, cores)
            if not code and study.detail and not (workdir / "detail.json").exists():
                code = _run(_detail_command(workdir, root / f"{study.detail}_{seed}"), workdir, cores)
            if code:
                print(f"{name}, seed {seed}, ended with exit code {code}: see {workdir}/log.txt", flush=True)
                failed.append(workdir.name)
            elif not network.exists() and (workdir / network.name).exists():
                shutil.copy(workdir / network.name, root / f"{network.name}.{seed}")
                os.replace(root / f"{network.name}.{seed}", network)
    return failed


def _run(command: Sequence[str], workdir: pathlib.Path, cores: Sequence[int]) -> int:
    """Runs a command on some cores, with its output in the workdir's log.txt, and returns its exit code."""
    with open(workdir / "log.txt", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        if cores:
            os.sched_setaffinity(process.pid, cores)  # before it makes threads, which keep to it
        return process.wait()


def _detail_command(workdir: pathlib.Path, teacher: pathlib.Path) -> list[str]:
    """Measures the detail of a finished run beside samples of the teacher; of the teacher, also keeps them."""
    command = [sys.executable, "-m", "dar_jax.evaluate", f"--workdir={workdir}", "--detail"]
    command += [f"--num_samples={DETAIL_SAMPLES}", f"--json={workdir}/detail.json"]
    keep = f"--samples_out={teacher}/samples.npz"
    return [*command, keep if workdir == teacher else f"--teacher_samples={teacher}/samples.npz"]


def collect(study: Study, root: pathlib.Path, failed: Sequence[str] = ()) -> dict:
    """What is kept of a study.

    {"commit", "shared", "failed", "unfinished": runs that have begun and are left out, "curves": {name: {seed: {step:
    {metric: value}}}}, "seconds": {name: {seed: of a step}}}, the seconds without evaluations and with what else the
    machine did.
    """
    from dar_jax.checkpoint import load_config
    from dar_jax.logs import read_metrics

    curves: dict = {}
    seconds: dict = {}
    unfinished = []
    for name, seed in ((name, seed) for cell in study.cells for name in study.names(cell) for seed in study.seeds):
        workdir = root / f"{name}_{seed}"
        lines = read_metrics(str(workdir))
        if lines and max(line["step"] for line in lines) < load_config(str(workdir)).train.num_steps:
            unfinished.append(workdir.name)
            continue
        for line in lines:
            if found := {metric: round(line[metric], 5) for metric in study.metrics if metric in line}:
                steps = curves.setdefault(name, {}).setdefault(str(seed), {})
                steps.setdefault(str(line["step"]), {}).update(found)
        if rates := [line["steps_per_second"] for line in lines if "steps_per_second" in line][1:]:
            seconds.setdefault(name, {})[str(seed)] = round(1 / float(np.median(rates)), 5)
        if (workdir / "detail.json").exists():
            sets = {one["name"]: one["scores"] for one in json.loads((workdir / "detail.json").read_text())}
            steps, scores = curves[name][str(seed)], sets["samples"]
            found = {metric: round(scores[metric], 5) for metric in study.metrics if metric in scores}
            steps[max(steps, key=int)].update(found)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    kept = {"commit": commit, "shared": list(study.shared), "failed": list(failed), "unfinished": unfinished}
    return kept | {"seconds": seconds, "curves": curves}


def pace(study: Study, rounds: int, steps: int = 10) -> dict[str, list[float]]:
    """Seconds of a train step of every cell, by rounds in which the cells take turns, after one to warm up.

    The batch is of noise, and initial weights do not matter. Of class-conditional models without a teacher.
    """
    import jax
    from ml_collections import config_flags

    from dar_jax import sharding
    from dar_jax.config import micro_batch
    from dar_jax.training.setup import build_algorithm, set_up

    cases, found = {}, {cell: [] for cell in study.cells}
    for cell, (variant, *own) in study.cells.items():
        values, argv = flags.FlagValues(), ["study", f"--config={study.config}:{variant}", *study.shared, *own]
        config_flags.DEFINE_config_file("config", flag_values=values)
        with mock.patch.object(sys, "argv", argv):  # where config_flags looks for the fields that are set
            values(argv)
        config = values.config
        if config.algorithm != "flow" or config.model.family != "sit":
            sys.exit(f"error: --pace times runs of algorithm flow and family sit; {cell} is another one.")
        size, count = config.model.input_size, micro_batch(config)
        x1 = jax.random.normal(jax.random.key(0), (count, size, size, config.model.channels))
        batch = {"x1": x1, "condition": {"label": jax.numpy.arange(count) % config.model.num_classes}}
        run = set_up(config, build_algorithm(config), sharding.make_mesh(config.mesh))
        cases[cell] = [run.step, run.init(), batch]
    for i in range(rounds + 1):
        for cell, case in cases.items():
            start = time.monotonic()
            for _ in range(steps):
                case[1], _ = case[0](case[1], (), case[2])
            jax.block_until_ready(case[1])
            found[cell] += [round((time.monotonic() - start) / steps, 5)] if i else []
        print(f"pace: round {i} of {rounds}", flush=True)
    return found


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
        found.append(time_table(study, kept))
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
