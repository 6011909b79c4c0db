"""A study: several configs with the same seeds, run one after the other, then tables and a figure with intervals.

A study is a file that declares a `Study` and calls `main`. It is run from the root of a clone, can be stopped at any
time, and goes on with the same command:

    python studies/repa.py --root=runs/repa               # trains what is missing, then collects and draws
    python studies/repa.py --root=runs/repa --jobs=2      # two runs at a time, each on half of the cores
    python studies/repa.py --root=runs/repa --minutes=50  # stops then; the same command goes on
    python studies/repa.py --root=runs/repa --train=0     # collects and draws what is there
    python studies/repa.py --pace=10                      # times the steps of all cells, which take turns

Seeds are paired: runs of one seed see the same data in the same order. Intervals are of Student's t over the seeds.
A run that fails is listed, and the others go on. Loss at equal time needs --pace, on a machine that does nothing else:
the logs of runs also tell how long a step took, but not what else the machine did. Curves of all runs are kept in
studies/<name>.json, from which tables and figure can be made again; with --root a page with all of them is written
there, <name>.html. What a study has when --minutes are over is kept in its root alone.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
from absl import app, flags
from study_tables import all_tables, best_name, draw, page

ROOT = flags.DEFINE_string("root", None, "Where the runs are; without it the curves of studies/<name>.json are used")
TRAIN = flags.DEFINE_bool("train", True, "Train what is missing")
PACE = flags.DEFINE_integer("pace", 0, "Rounds in which the cells take turns for ten steps each, and are timed", 0)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its share of the cores and of a GPU", lower_bound=1)
MINUTES = flags.DEFINE_float("minutes", None, "Stop after so long: runs save, and the same command goes on", 0)
DATA = flags.DEFINE_string("data", None, "Where the data is, if not where the config has it")
STUDIES = pathlib.Path(__file__).parent
DETAIL_SAMPLES = 1024
NETWORK = "convnet.npz"  # of fd_convnet: it depends on the data alone


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
        path, figure = STUDIES / f"{study.name}.json", STUDIES.parent / "docs" / f"study_{study.name}.png"
        root, failed = pathlib.Path(ROOT.value or ""), []
        if ROOT.value:
            machine = Machine(JOBS.value, MINUTES.value, DATA.value)
            failed = train(study, root, machine) if TRAIN.value else []
            kept = collect(study, root, failed)
            if machine.stopped.is_set():
                path, figure = root / path.name, root / figure.name
                print(f"stopped after {MINUTES.value:g} minutes; the same command goes on", flush=True)
            else:
                kept = _kept(path, "pace", "paced_on") | kept
            if not kept["curves"] and (failed or not machine.stopped.is_set()):
                named = f", and the log.txt of those that failed: {', '.join(failed)}" if failed else ""
                sys.exit(f"error: no run of {study.name} has ended; see {root}{named}.")
            if not kept["curves"]:
                return
            path.write_text(json.dumps(kept, indent=1) + "\n")
        if PACE.value:
            paced = {"pace": pace(study, PACE.value), "paced_on": _this_machine()}
            path.write_text(json.dumps(_kept(path) | paced, indent=1) + "\n")
        if not path.exists():
            sys.exit(f"error: {path} is not there; name the directory of the runs with --root.")
        kept = json.loads(path.read_text())
        tables = all_tables(study, kept)
        print("\n\n".join(tables))
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


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def _this_machine() -> str:
    """Date, devices, version of jax and commit of what is measured now."""
    import jax

    device = f"{os.cpu_count()} cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return f"{time.strftime('%Y-%m-%d')}, {device}, jax {jax.__version__}, commit {_commit()}"


class Machine:
    """Trains `jobs` runs at a time, each on its share of the cores and of a GPU's memory, for so many minutes.

    `data` is where it has the data, if not where the config has it.
    """

    def __init__(self, jobs: int = 1, minutes: float | None = None, data: str | None = None):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.jobs, self.data, self.stopped, self._shares = jobs, data, threading.Event(), queue.SimpleQueue()
        for i in range(jobs):
            self._shares.put(cores[i::jobs])
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._environment = dict(os.environ)
        if jobs > 1:  # jax takes three quarters of a GPU unless it is told how much
            self._environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.3f}")

    def run(self, command: Sequence[str], log: pathlib.Path) -> int:
        """Runs a command with its output at the end of `log`, and returns its exit code.

        When the time is over it is told to save and end, and `stopped` is set.
        """
        cores = self._shares.get()
        try:
            with open(log, "a") as output:
                made = {"stdout": output, "stderr": subprocess.STDOUT, "env": self._environment}
                process = subprocess.Popen(command, **made)
                if cores:
                    os.sched_setaffinity(process.pid, cores)  # before it makes threads, which keep to it
                try:
                    return process.wait(None if self._end is None else max(0, self._end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.stopped.set()
                    process.terminate()
                    return process.wait()
        finally:
            self._shares.put(cores)


class _Run(NamedTuple):
    cell: str
    name: str
    rate: float | None
    seed: int


def train(study: Study, root: pathlib.Path, machine: Machine) -> list[str]:
    """Trains all runs, seed by seed, so that whole pairs come first. A finished run takes seconds.

    Rates are tried first, with the seeds of the sweep, and further ones until the best is inside.

    Returns the names of the runs that failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(machine.jobs) as pool:
        try:

            def run(cells: dict[str, list[str]], sweeps: bool) -> dict:
                running: dict[_Run, concurrent.futures.Future] = {}
                for one in _runs(study, cells, sweeps):  # what a run waits for was begun before it
                    needs = [running[other] for other in _needs(study, root, one, list(running))]
                    running[one] = pool.submit(_train_run, study, one, root, machine, needs)
                failed.extend(f"{one.name}_{one.seed}" for one, job in running.items() if not job.result())
                return collect(study, root)["curves"]

            tried = {cell: [f"{cell}@{rate:g}" for rate in study.rates] or [cell] for cell in study.cells}
            cells = dict(tried)
            while cells and not machine.stopped.is_set():
                curves = run(cells, sweeps=True)
                cells = {cell: further for cell in cells if (further := _further(study, curves, cell, tried[cell]))}
                for cell, further in cells.items():
                    tried[cell] += further
            if not machine.stopped.is_set():
                best = {cell: best_name(study, curves, cell) for cell in study.cells}
                run({cell: [name] for cell, name in best.items() if name in curves}, sweeps=False)
            return failed
        except BaseException:  # Ctrl-C reaches the runs too, which save and end
            machine.stopped.set()
            raise


def _runs(study: Study, cells: Mapping[str, Sequence[str]], sweeps: bool) -> list[_Run]:
    """The runs that `cells` names, of the seeds that do or do not choose a rate."""
    seeds = [seed for seed in study.seeds if study.sweeps(seed) == sweeps]
    rates = study.all_rates() or [None]
    named = [(cell, *pair) for cell in study.cells for pair in zip(study.names(cell), rates, strict=True)]
    return [_Run(*one, seed) for seed in seeds for one in named if one[1] in cells.get(one[0], ())]


def _own_flags(study: Study, one: _Run, root: pathlib.Path) -> list[str]:
    return [flag.format(root=root, seed=one.seed) for flag in study.cells[one.cell][1:]]


def _needs(study: Study, root: pathlib.Path, one: _Run, begun: Sequence[_Run]) -> list[_Run]:
    """The runs that must have ended before this one starts: its teacher, and the first run, whose network all take."""
    found = [] if "fd_convnet" not in study.metrics or (root / NETWORK).exists() else list(begun[:1])
    named = [*_own_flags(study, one, root), f"{root}/{study.detail}_{one.seed}"]
    return found + [run for run in begun if any(f"{root}/{run.name}_{run.seed}" in text for text in named)]


def _further(study: Study, curves: Mapping, cell: str, tried: Sequence[str]) -> list[str]:
    """The rate beside the best one of those tried, if that is at their end and there is one."""
    names = study.names(cell)
    best, places = names.index(best_name(study, curves, cell)), [names.index(name) for name in tried]
    beside = {min(places): min(places) - 1, max(places): max(places) + 1}.get(best, -1)
    return names[beside : beside + 1] if beside >= 0 and names[best] in curves else []


def _train_run(study: Study, one: _Run, root: pathlib.Path, machine: Machine, needs: Sequence) -> bool:
    """Trains a run when those that it needs have ended, and returns whether all went well."""
    concurrent.futures.wait(needs)
    if machine.stopped.is_set():
        return True
    workdir, network = root / f"{one.name}_{one.seed}", root / NETWORK
    workdir.mkdir(exist_ok=True)
    if network.exists() and not (workdir / NETWORK).exists():
        shutil.copy(network, workdir)
    config = f"--config={study.config}:{study.cells[one.cell][0]}"
    command = [sys.executable, "-m", "dar_jax.main", config, f"--workdir={workdir}", f"--config.seed={one.seed}"]
    command += [*study.shared, *_own_flags(study, one, root)]
    command += [f"--config.optimizer.learning_rate={one.rate}"] if one.rate else []
    command += [f"--config.data.path={machine.data}"] if machine.data else []
    print(f"{one.name}, seed {one.seed}", flush=True)
    code = machine.run(command, workdir / "log.txt")
    if not code and not machine.stopped.is_set() and study.detail and not (workdir / "detail.json").exists():
        code = machine.run(_detail_command(workdir, root / f"{study.detail}_{one.seed}"), workdir / "log.txt")
    if machine.stopped.is_set():
        return True
    if code:
        print(f"{one.name}, seed {one.seed}, ended with exit code {code}: see {workdir}/log.txt", flush=True)
    elif not network.exists() and (workdir / NETWORK).exists():
        shutil.copy(workdir / NETWORK, root / f"{NETWORK}.{one.name}_{one.seed}")
        os.replace(root / f"{NETWORK}.{one.name}_{one.seed}", network)
    return not code


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
    kept = {"commit": _commit(), "shared": list(study.shared), "failed": list(failed), "unfinished": unfinished}
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
