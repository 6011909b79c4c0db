"""What machines do to a run: killed at any time, a disk that fills up, losses that are not finite."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from dar_jax.checkpoint import latest_step
from dar_jax.data.feed import open_batches
from dar_jax.errors import UserError
from dar_jax.logs import Logs
from dar_jax.training import loop
from tests.integration.doors import Doors, kill
from tests.training import tiny

EVERY, SLOW = 3, pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("times", "algorithm"), [(3, "flow"), pytest.param(20, "flow", marks=SLOW), pytest.param(3, "dmd", marks=SLOW)]
)
def test_killed_at_any_time_it_goes_on(times, algorithm, cache, tmp_path, tmp_path_factory):
    """kill -9 at random, also while a checkpoint is written: every checkpoint that was there stays and is taken up.

    A save runs beside the next steps, so what may be lost is the steps since the one before. In the end the losses are
    those of a run that was never killed.
    """
    own = []
    if algorithm == "dmd":
        teacher = Doors(tmp_path_factory.mktemp("teacher"), cache)
        teacher.run("--config.model.routing.kind=residual", devices=1)
        own = [f"--config.teacher={teacher.workdir}", "--config.algorithm=dmd", "--config.model.label_dropout=0.0"]
        own += ["--config.model.routing.summary=sum"]
    rng, doors, last = random.Random(0), Doors(tmp_path, cache), 0
    flags = [*own, f"--config.checkpoint.every_steps={EVERY}", "--config.train.num_steps=100000"]
    kept = []
    for _ in range(times):
        (process,) = doors.start(*flags, devices=1)
        while (latest_step(str(doors.workdir)) or 0) <= last and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        kill([process])
        assert process.returncode == -9
        last = latest_step(str(doors.workdir))
        logged = max(doors.metrics())
        assert last <= logged <= last + 2 * EVERY + 1
        kept.append(last)
    assert kept == sorted(set(kept))
    assert f"resumed at step {last} " in doors.run(*flags[:-1], f"--config.train.num_steps={last + 2}", devices=1)
    assert list(doors.metrics()) == list(range(1, last + 3))

    whole = Doors(tmp_path_factory.mktemp("whole"), cache)
    whole.run(*own, f"--config.train.num_steps={last + 2}", "--config.checkpoint.every_steps=100000", devices=1)
    np.testing.assert_array_equal(list(doors.metrics().values()), list(whole.metrics().values()))


def test_full_disk_is_one_error_and_the_last_checkpoint_survives(cache, tmp_path):
    """The save of step 8 fails; the run says so and ends, and goes on when there is room."""
    doors = Doors(tmp_path, cache)
    (process,) = doors.start(devices=1, send=(0, "FULL,6,4"))
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 2, output
    # Not always the last line: orbax's threads may have a word when the process ends.
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error == (
        f'error: workdir "{doors.workdir}" cannot be written: File too large. The checkpoint of step 4 is whole. '
        "Make room, and the same command goes on."
    )
    assert "resumed at step 4 " in doors.run(devices=1)
    assert latest_step(str(doors.workdir)) == 12


def run_with_bad_steps(monkeypatch, workdir, bad, max_skipped):
    """Twelve steps of which those in `bad` (from 1) get an image of NaN."""

    @contextlib.contextmanager
    def spoilt(*args, first_step, **kwargs):
        with open_batches(*args, first_step=first_step, **kwargs) as batches:
            numbered = enumerate(batches, start=first_step + 1)
            yield ({**batch, "x1": batch["x1"] * (np.nan if step in bad else 1)} for step, batch in numbered)

    config = tiny.make_config()
    config.train.max_skipped = max_skipped
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_batches", spoilt)
        loop.train(config, str(workdir))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    with tiny.all_runs_on((1, 1), tmp_path_factory.mktemp("cache")):
        yield


def test_steps_that_are_not_finite_are_skipped(in_process, monkeypatch, tmp_path, capsys):
    run_with_bad_steps(monkeypatch, tmp_path, {3, 4, 9}, max_skipped=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [
        (1, 0), (2, 0), (5, 2), (6, 2), (7, 2), (8, 2), (10, 3), (11, 3), (12, 3)
    ]  # fmt: skip
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    # The norm of the weights after the skipped steps is that before, but for the step that follows them.
    assert abs(lines[2]["param_norm"] - lines[1]["param_norm"]) < 0.1
    assert re.search(r"step 9 is not finite and skipped: .*loss nan.* \(3 skipped so far\)", capsys.readouterr().out)


def test_too_many_in_a_row_end_the_run(in_process, monkeypatch, tmp_path):
    """The checkpoints before are of good weights, and the run can go on from them with other settings."""
    with pytest.raises(UserError, match=r"step 7 is not finite: .*So were the 2 before it, all skipped"):
        run_with_bad_steps(monkeypatch, tmp_path, {5, 6, 7}, max_skipped=2)
    assert latest_step(str(tmp_path)) == 4
    run_with_bad_steps(monkeypatch, tmp_path, {5, 6, 7}, max_skipped=3)
    assert latest_step(str(tmp_path)) == 12


def run_and_do_at(monkeypatch, workdir, step, action):
    """Twelve steps; `action` happens when the metrics of `step` are logged."""
    progress = Logs.progress

    def progress_and_act(self, logged, scalars):
        progress(self, logged, scalars)
        if logged == step:
            action()

    with monkeypatch.context() as patch:
        patch.setattr(Logs, "progress", progress_and_act)
        loop.train(tiny.make_config(), str(workdir))


@pytest.mark.parametrize("step", [2, 7])
def test_workdir_removed_while_running_is_an_error_and_stays_removed(in_process, monkeypatch, tmp_path, step):
    """Before the first save, and between two; a save that is under way may leave a part of itself."""
    workdir = tmp_path / "run"

    def remove():
        while step > 4 and not (workdir / "checkpoints" / "4").exists():
            time.sleep(0.05)
        shutil.rmtree(workdir)

    with pytest.raises(UserError, match=rf'workdir "{workdir}" was removed while this run was writing there'):
        run_and_do_at(monkeypatch, workdir, step, remove)
    assert not workdir.exists()


def test_a_second_run_is_refused_and_the_first_goes_on(in_process, monkeypatch, tmp_path):
    def start_another():
        with pytest.raises(UserError, match=rf'workdir "{tmp_path}" is in use by process {os.getpid()} on'):
            loop.train(tiny.make_config(), str(tmp_path))

    run_and_do_at(monkeypatch, tmp_path, 5, start_another)
    assert latest_step(str(tmp_path)) == 12
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 13)
    ]


def test_checkpoints_that_cannot_be_written_are_found_before_the_first_step(in_process, tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r'--workdir = ".*/checkpoints" cannot be written: '):
        loop.train(tiny.make_config(), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_hangup_saves_and_no_output_is_no_error(in_process, monkeypatch, tmp_path):
    """As when a terminal is closed: SIGHUP comes, and nobody reads what the run prints."""

    def hang_up():
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, has it ignored
    try:
        run_and_do_at(monkeypatch, tmp_path, 6, hang_up)
        assert latest_step(str(tmp_path)) in (6, 7)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
