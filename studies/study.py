"""A study: several configs with the same seeds, run one after the other, then a table and a figure with intervals.

A study is a file that declares a `Study` and calls `main`. It is run from the root of a clone, can be stopped at any
time, and goes on with the same command:

    python studies/repa.py --root=runs/repa             # trains what is missing, then collects and draws
    python studies/repa.py --root=runs/repa --train=0   # collects and draws what is there

Seeds are paired: runs of one seed see the same data in the same order. Intervals are of Student's t over the seeds.
Curves of all runs are kept in studies/<name>.json, from which the table and the figure can be made again.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags

ROOT = flags.DEFINE_string("root", None, "Where the runs are; without it the curves of studies/<name>.json are used")
TRAIN = flags.DEFINE_bool("train", True, "Train what is missing")
STUDIES = pathlib.Path(__file__).parent
DETAIL_SAMPLES = 1024
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by runs


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
      metrics: what is compared, of metrics.jsonl and of `detail`; lower is better but for accuracies.
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
    baselines: Sequence[str] = ()
    detail: str = ""


def main(study: Study) -> None:
    """The whole program of a study."""

    def run(_):
        if ROOT.value and TRAIN.value:
            train(study, pathlib.Path(ROOT.value))
        path = STUDIES / f"{study.name}.json"
        if ROOT.value:
            path.write_text(json.dumps(collect(study, pathlib.Path(ROOT.value)), indent=1) + "\n")
        curves = json.loads(path.read_text())["curves"]
        print(table(study, curves))
        draw(study, curves, STUDIES.parent / "docs" / f"study_{study.name}.png")

    app.run(run)


def train(study: Study, root: pathlib.Path) -> None:
    """Trains all runs, seed by seed, so that whole pairs come first. A finished run takes seconds."""
    network = root / "convnet.npz"  # of fd_convnet: it depends on the data alone
    for seed in study.seeds:
        for cell, (variant, *own) in study.cells.items():
            workdir = root / f"{cell}_{seed}"
            workdir.mkdir(parents=True, exist_ok=True)
            if network.exists() and not (workdir / network.name).exists():
                shutil.copy(network, workdir)
            command = [sys.executable, "-m", "dar_jax.main", f"--config={study.config}:{variant}"]
            own = [flag.format(root=root, seed=seed) for flag in own]
            command += [f"--workdir={workdir}", f"--config.seed={seed}", *study.shared, *own]
            print(f"{cell}, seed {seed}", flush=True)
            with open(workdir / "log.txt", "a") as log:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
            if not code and study.detail:
                code = measure_detail(workdir, root / f"{study.detail}_{seed}")
            if code:
                sys.exit(f"error: the run ended with exit code {code}; see {workdir}/log.txt.")
            if not network.exists() and (workdir / network.name).exists():
                shutil.copy(workdir / network.name, network)


def measure_detail(workdir: pathlib.Path, teacher: pathlib.Path) -> int:
    """Measures the detail of a finished run beside samples of the teacher, once. Returns an exit code."""
    if (workdir / "detail.json").exists():
        return 0
    command = [sys.executable, "-m", "dar_jax.evaluate", f"--workdir={workdir}", "--detail"]
    command += [f"--num_samples={DETAIL_SAMPLES}", f"--json={workdir}/detail.json"]
    if workdir == teacher:
        command += [f"--samples_out={teacher}/samples.npz"]
    else:
        command += [f"--teacher_samples={teacher}/samples.npz"]
    with open(workdir / "log.txt", "a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def collect(study: Study, root: pathlib.Path) -> dict:
    """The curves of all runs that are there: {"curves": {cell: {seed: {step: {metric: value}}}}}, and where from."""
    from dar_jax.logs import read_metrics

    curves: dict = {}
    for cell in study.cells:
        for seed in study.seeds:
            for line in read_metrics(str(root / f"{cell}_{seed}")):
                if found := {name: round(line[name], 5) for name in study.metrics if name in line}:
                    steps = curves.setdefault(cell, {}).setdefault(str(seed), {})
                    steps.setdefault(str(line["step"]), {}).update(found)
            if (detail := root / f"{cell}_{seed}" / "detail.json").exists():
                scores = {one["name"]: one["scores"] for one in json.loads(detail.read_text())}["samples"]
                found = {name: round(scores[name], 5) for name in study.metrics if name in scores}
                steps = curves[cell][str(seed)]
                steps[max(steps, key=int)].update(found)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "shared": list(study.shared), "curves": curves}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of the mean, NaN of a single value."""
    count = len(values)
    half = T_95[count] * np.std(values, ddof=1) / np.sqrt(count) if count > 1 else float("nan")
    return float(np.mean(values)), float(half)


def finals(curves: dict, cell: str, metric: str) -> dict[str, float]:
    """The metric at the last step of each seed of a cell, of those seeds that have reached it."""
    last = str(max((max(map(int, steps)) for steps in curves.get(cell, {}).values()), default=0))
    at_last = {seed: steps.get(last, {}) for seed, steps in curves.get(cell, {}).items()}
    return {seed: values[metric] for seed, values in at_last.items() if metric in values}


def table(study: Study, curves: dict) -> str:
    """Cells and paired differences at the last step, as Markdown."""
    rows = ["| cell | runs | " + " | ".join(study.metrics) + " |", "|---" * (2 + len(study.metrics)) + "|"]

    def row(name: str, values: list[list[float]], sign: str) -> None:
        cells = []
        for found in values:
            mean, half = interval(found) if found else (float("nan"), float("nan"))
            cells.append(f"{mean:{sign}.4g} ± {half:.2g}")
        rows.append(f"| {name} | {len(values[0])} | " + " | ".join(cells) + " |")

    for cell in study.cells:
        row(f"`{cell}`", [list(finals(curves, cell, metric).values()) for metric in study.metrics], "")
    for a, b in study.differences:
        pairs = []
        for metric in study.metrics:
            left, right = finals(curves, a, metric), finals(curves, b, metric)
            pairs.append([left[seed] - right[seed] for seed in left if seed in right])
        row(f"`{a}` - `{b}`", pairs, "+")
    return "\n".join(rows)


def draw(study: Study, curves: dict, path: pathlib.Path) -> None:
    """A panel for each metric: means of the cells over the steps, or a line of baselines, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(study.metrics), figsize=(5.5 * len(study.metrics), 4), layout="constrained")
    for axis, metric in zip(np.atleast_1d(axes), study.metrics, strict=True):
        for i, cell in enumerate(c for c in study.cells if c in curves):
            seeds = list(curves[cell].values())
            steps = sorted(int(s) for s in seeds[0] if all(metric in one.get(s, {}) for one in seeds))
            points = [interval([one[str(step)][metric] for one in seeds]) for step in steps]
            mean, half = np.array(points).reshape(-1, 2).T
            if cell in study.baselines:
                if len(mean):
                    axis.axhline(mean[-1], color=f"C{i}", label=cell, linestyle="--")
                continue
            axis.plot(steps, mean, color=f"C{i}", label=cell, marker="o", markersize=3)
            axis.fill_between(steps, mean - half, mean + half, color=f"C{i}", alpha=0.12, linewidth=0)
        axis.set(xlabel="step", ylabel=metric)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
