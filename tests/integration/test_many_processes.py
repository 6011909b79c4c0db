"""One run of several processes: the numbers of one process, and it goes on after what happens to clusters."""

import numpy as np
import pytest
from PIL import Image

from dar_jax.checkpoint import latest_step
from tests.integration.doors import Doors

FLAGS = ["--config.eval.every_steps=12", "--config.eval.num_samples=0", "--config.eval.grid_size=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """Twelve steps in one process of four devices."""
    doors = Doors(tmp_path_factory.mktemp("alone"), cache)
    doors.run(*FLAGS, "--config.mesh.fsdp=2")
    return doors


def assert_same(doors: Doors, reference: Doors):
    """Losses, gradient norms and samples, within what the order of float32 sums leaves."""
    ours, theirs = doors.metrics(), reference.metrics()
    assert list(ours) == list(theirs) == list(range(1, 13))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    grids = [np.asarray(Image.open(d.workdir / "samples" / "00000012.png"), int) for d in (doors, reference)]
    assert np.ptp(grids[0]) > 50
    np.testing.assert_allclose(*grids, atol=1)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_two_processes_killed_and_started_again_equal_one(processes, devices, alone, cache, tmp_path):
    """The second dies at step 7; they go on from step 4 with mesh.tensor: of four, two by two on the same samples."""
    doors = Doors(tmp_path, cache)
    started = doors.start(*FLAGS, "--config.mesh.fsdp=2", processes=2, devices=2, send=(1, "SIGKILL,7,4"))
    output = started[1].communicate(timeout=500)[0]
    assert started[1].returncode == -9, output
    output = started[0].communicate(timeout=60)[0]
    assert started[0].returncode == 2, output
    assert "error: process 1 (pid " in output and "it has ended without a word" in output
    assert latest_step(str(doors.workdir)) == 4
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    text = doors.run(*FLAGS, *mesh, "--distributed=on", processes=processes, devices=devices)
    assert "resumed at step 4" in text
    assert_same(doors, alone)


def test_sigterm_to_any_process_saves_on_all_and_another_number_goes_on(alone, cache, tmp_path):
    """It reaches the second process only; both leave with 0, and one process of another mesh takes over."""
    doors = Doors(tmp_path, cache)
    text = doors.run(*FLAGS, "--config.mesh.fsdp=2", processes=2, devices=2, send=(1, "SIGTERM,6,4"))
    stopped = latest_step(str(doors.workdir))
    assert 6 < stopped < 12
    assert f"stopped by a signal at step {stopped}, saved; the same command goes on from here" in text
    assert f"resumed at step {stopped}" in doors.run(*FLAGS, "--config.mesh.fsdp=4")
    assert_same(doors, alone)


def test_hosts_that_disagree_are_one_line_on_each_before_anything_is_written(cache, tmp_path):
    """As with a stale checkout on one of them: its config file says something else."""
    doors = Doors(tmp_path, cache)
    text = doors.config_file.read_text()
    text = (
        text.replace("return", "config =") + "    config.seed = int(os.environ['JAX_PROCESS_ID'])\n    return config\n"
    )
    doors.config_file.write_text("import os\n" + text)
    processes = doors.start(processes=2, devices=1)
    for process in processes:
        lines = process.communicate(timeout=60)[0].splitlines()
        (error,) = [line for line in lines if not line.startswith("waiting for ")]
        assert process.returncode == 2
        assert "the processes of this job disagree: config.seed is 0 in process 0 (pid" in error
        assert "1 in process 1 (pid" in error
    assert not doors.workdir.exists()
