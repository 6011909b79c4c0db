"""A checkout with the launch scripts, and a world of fakes (fake.py) they run in."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("gcloud", "sbatch", "srun", "scontrol", "sudo", "mountpoint", "uv", "sleep", "python")


class World:
    """Runs a launch script among the fakes and reads what they were called with."""

    def __init__(self, folder):
        self.folder, self.checkout = folder, folder / "checkout"
        (folder / "bin").mkdir()
        fake = pathlib.Path(__file__).with_name("fake.py").read_text()
        for name in NAMES:
            path = folder / "bin" / name
            path.write_text(f"#!{sys.executable} -SE\n{fake}")
            path.chmod(0o755)
        tail = folder / "bin" / "tail"
        tail.write_text(f'#!/bin/sh\nexec {shutil.which("tail")} --sleep-interval=0.05 "$@"\n')  # than one second
        tail.chmod(0o755)
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "dar_jax" / "planning").mkdir(parents=True)
        for path in (ROOT / "dar_jax" / "planning").glob("*_xla_flags.txt"):
            shutil.copy(path, self.checkout / "dar_jax" / "planning")
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        (self.checkout / ".venv" / "bin" / "python").symlink_to(folder / "bin" / "python")
        (self.checkout / ".gitignore").write_text(".venv\nruns\n")
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "user"),
            "FAKE": str(folder),
            "CLOUDSDK_CONFIG": str(folder / "nobody"),  # should a real gcloud be reached after all, it knows no account
            **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.set(hosts="1", state="MISSING", runs="0", calls="")

    def git(self, *words):
        subprocess.run(["git", "-C", self.checkout, *words], env=self.env, check=True)

    def set(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def command(self, script, *words):
        return [str(self.checkout / "launch" / script), *words]

    def run(self, script, *words, **env):
        return subprocess.run(
            self.command(script, *words),
            env=self.env | env,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=60,
        )

    def refuse(self, script, words, names):
        """The script ends with one line that holds all `names`, before anything is called."""
        result = self.run(script, *words)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("error: ") and all(name in line for name in names), line
        assert not (self.folder / "calls").read_text()

    def calls(self, name):
        lines = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [line for line in lines if line["name"] == name]

    def trained(self):
        """The calls of python -m dar_jax.main."""
        return [call for call in self.calls("python") if call["args"][:2] == ["-m", "dar_jax.main"]]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)
