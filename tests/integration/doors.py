"""Runs of dar_jax.main in processes of their own, one or several, on host devices; a signal can be arranged."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

from tests import compiling

ROOT = pathlib.Path(__file__).parents[2]
CONFIG_FILE = """
from tests.training import tiny

def get_config():
    return tiny.make_config()
"""
# The door, with a signal to this very process once a step is logged and another is saved: "SIGTERM,7,4". FULL stands
# for a disk that fills up: from then on no file may grow beyond 8 KiB.
DOOR = """
import os, resource, signal, time
from dar_jax import cli, files, main
from dar_jax.logs import Logs

number, step, saved = os.environ["SEND"].split(",")
progress = Logs.progress

def progress_and_signal(self, logged, scalars):
    progress(self, logged, scalars)
    if logged == int(step):
        while not (files.path(main.WORKDIR.value) / "checkpoints" / saved / "commit_success.txt").exists():
            time.sleep(0.01)
        if number == "FULL":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        else:
            os.kill(os.getpid(), getattr(signal, number))

Logs.progress = progress_and_signal
cli.run(main.main)
"""


class Doors:
    """A workdir, and a cache of compiled programs that all its runs share."""

    def __init__(self, directory: pathlib.Path, cache: pathlib.Path):
        self.workdir, self.cache, self.config_file = directory / "run", cache, directory / "config.py"
        self.config_file.write_text(CONFIG_FILE)

    def start(self, *flags: str, processes: int = 1, devices: int = 4, send=None) -> list[subprocess.Popen]:
        """`send` = (process, "SIGKILL,7,4") makes this process send itself a signal. Output of all is piped."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for index in range(processes):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {compiling.FLAGS}",
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(ROOT),
            }
            if processes > 1:
                environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
                environment |= {"JAX_PROCESS_ID": str(index)}
            door = ["-m", "dar_jax.main"]
            if send and send[0] == index:
                door, environment["SEND"] = ["-c", DOOR], send[1]
            command = [sys.executable, *door, f"--config={self.config_file}", f"--workdir={self.workdir}", *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return started

    def run(self, *flags: str, **options) -> str:
        """Runs to the end and returns what the first process printed; all must exit with 0."""
        started = self.start(*flags, **options)
        outputs = [process.communicate(timeout=500)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
        return outputs[0]

    def metrics(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm of every logged step. A line that a crash cut short is none."""
        text = (self.workdir / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def kill(processes: list[subprocess.Popen]) -> None:
    """SIGKILL to all, which loses whatever they have not written."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
