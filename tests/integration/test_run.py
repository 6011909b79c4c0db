"""A run that is stopped, killed or crashes goes on bit for bit; what it leaves behind can be sampled."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dar_jax.checkpoint import load_config
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.logs import Logs
from dar_jax.training import loop
from tests.integration.doors import Doors
from tests.training import tiny


@pytest.fixture(autouse=True, scope="module")
def one_device(tmp_path_factory):
    with tiny.all_runs_on((1, 1), tmp_path_factory.mktemp("cache")):
        yield


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an uninterrupted run of twelve steps."""
    workdir = tmp_path_factory.mktemp("finished")
    loop.train(tiny.make_config(), str(workdir))
    return workdir


def signal_at(monkeypatch, step):
    """Sends SIGTERM to this process when `step` is logged (0: when the train step is to be compiled)."""
    progress, say = Logs.progress, loop.say

    def progress_and_signal(self, logged, scalars):
        progress(self, logged, scalars)
        if logged == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def say_and_signal(message):
        say(message)
        if step == 0 and message.startswith("compiling"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Logs, "progress", progress_and_signal)
    monkeypatch.setattr(loop, "say", say_and_signal)


@pytest.mark.parametrize("step", [0, 6])
def test_sigterm_saves_and_the_same_command_goes_on(step, finished, tmp_path, monkeypatch, capsys):
    """Also before the first step. Losses and gradient norms then equal the uninterrupted run's bit for bit."""
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        loop.train(tiny.make_config(), str(tmp_path))
    saved = max(int(name) for name in os.listdir(tmp_path / "checkpoints"))
    assert step <= saved <= step + 1 + (step > 0)
    assert f"stopped by a signal at step {saved}, saved; the same command goes on" in capsys.readouterr().out
    loop.train(tiny.make_config(), str(tmp_path))
    assert f"resumed at step {saved}" in capsys.readouterr().out
    assert losses(tmp_path) == losses(finished)
    assert [s for s, _, _ in losses(tmp_path)] == list(range(1, 13))


def test_kill_9_through_the_door(finished, tmp_path):
    """A killed process loses the steps since its last checkpoint, and takes them again to the same losses."""
    doors = Doors(tmp_path, tmp_path / "cache")
    (process,) = doors.start(devices=1, send=(0, "SIGKILL,7,4"))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == -signal.SIGKILL, output
    assert len(losses(doors.workdir)) == 7
    assert "resumed at step 4" in doors.run(devices=1)
    assert len(losses(doors.workdir)) == 12
    assert losses(doors.workdir) == losses(finished)


def test_stop_before_the_loop_listens(tmp_path):
    """SIGTERM while the door still imports: exit code 0 and nothing is left behind."""
    code = (
        "import os, signal, sys, types; from dar_jax import cli, main;"
        "loop = types.ModuleType('loop'); loop.check = lambda *_: None;"
        "loop.train = lambda *_: os.kill(os.getpid(), signal.SIGTERM);"
        "sys.modules['dar_jax.training.loop'] = loop; cli.run(main.main)"
    )
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}/run"]
    result = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "stopped by a signal before the first step" in result.stdout
    assert not list(tmp_path.iterdir())


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_non_finite_step_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    """The first bad step is caught although its loss is finite, and nothing is saved over or beside the good state."""
    config = tiny.make_config()
    config.train.num_steps = 4
    loop.train(config, str(tmp_path))
    before = contents(tmp_path / "checkpoints")
    config.train.num_steps = 12
    config.optimizer.learning_rate = 1e30
    config.checkpoint.every_steps = 1
    with pytest.raises(UserError, match=f"step 5 is not finite: .*last good checkpoint is step 4 in {tmp_path}"):
        loop.train(config, str(tmp_path))
    assert contents(tmp_path / "checkpoints") == before


def test_message_names_a_checkpoint_that_leads_to_the_failure():
    """A loss is of the weights before its step: when it is not finite, a checkpoint of these weights is no good."""
    values = {"loss": float("nan"), "grad_norm": 1.0, "param_norm": 1.0}
    text = loop.diverged(6, values, [4, 5], "runs/x", 0)
    assert "last good checkpoint is step 4 in runs/x" in text
    assert "Remove runs/x/checkpoints/5" in text
    values = {"loss": 1.0, "grad_norm": 1.0, "param_norm": float("inf")}
    text = loop.diverged(6, values, [4, 5], "runs/x", 0)
    assert "last good checkpoint is step 5" in text
    assert "Remove" not in text
    assert "No good checkpoint" in loop.diverged(1, values, [], "runs/x", 0)


def test_finished_run_has_nothing_to_do(finished, capsys):
    before = contents(finished)
    loop.train(tiny.make_config(), str(finished))
    assert "nothing to do" in capsys.readouterr().out
    assert contents(finished) == before


def test_samples_do_not_depend_on_the_batch(finished, tmp_path):
    """The first eight of sixteen images, drawn eight or sixteen at a time; the .npz has the ADM layout."""
    arrays = {}
    for batch_size in (8, 16):
        config = load_config(str(finished))
        config.eval.batch_size = batch_size
        out = tmp_path / f"{batch_size}.npz"
        sample_to_file(config, str(finished), None, ["3", "1"], 8, str(out))
        arrays[batch_size] = np.load(out)
        assert arrays[batch_size].files == ["arr_0", "arr_1"]
    images = arrays[8]["arr_0"]
    assert (images.dtype, images.shape) == (np.uint8, (16, 8, 8, 1))
    np.testing.assert_array_equal(arrays[8]["arr_1"], np.tile([3, 1], 8))
    assert len({image.tobytes() for image in images}) == 16
    # Another batch is another program: the last bit of a float, and so a grey level on its edge, may differ.
    assert np.abs(images.astype(int) - arrays[16]["arr_0"]).max() <= 1


def test_sample_grid_is_a_picture(finished, tmp_path):
    config = load_config(str(finished))
    sample_to_file(config, str(finished), 8, ["3", "1", "2"], 2, str(tmp_path / "new" / "grid.png"))
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.mode == "L"
        assert grid.width > grid.height
