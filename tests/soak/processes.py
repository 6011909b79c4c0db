"""Processes that are forked from one that has imported the libraries, and the doors of dar_jax among them."""

import atexit
import contextlib
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests import compiling

ROOT = pathlib.Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = (
    "dar_jax.training.loop",
    "dar_jax.validate",
    "dar_jax.evaluation.scoring",
    "dar_jax.data.prepare",
    "dar_jax.pretrained.vae",
    "clu.metric_writers",
    "clu.parameter_overview",
    "ml_collections.config_flags",
    "tests.training.tiny",
    "grain",
)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": compiling.FLAGS,
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "OPENBLAS_NUM_THREADS": "1",  # a process with threads cannot be forked
    "PYTHONPATH": str(ROOT),
}
SILENCE = 60  # seconds without a line after which a process hangs
MARK = "soak: "  # of lines that a forked process sends back


def set_up(cache: pathlib.Path) -> None:
    """Prepares this process, before its first fork; the doors keep their compiled programs in `cache`."""
    os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=str(cache))
    CONTEXT.set_forkserver_preload(list(IMPORTED))


def _forked(output, function: Callable, args: tuple) -> None:
    """What a forked process does: `function`, with its output in a pipe."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        function(*args)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # as the interpreter does; multiprocessing leaves without


def _door(module: str, flags: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.argv = [module, *flags]
    runpy.run_module(f"dar_jax.{module}", run_name="__main__")


class Process:
    """A process whose output is collected."""

    def __init__(self, function: Callable, *args: Any):
        self._start(lambda output: CONTEXT.Process(target=_forked, args=(output, function, args)))
        self.poll = lambda: self.process.exitcode

    def _start(self, make: Callable) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        self.text, self.heard, self.process = "", time.monotonic(), make(writer)
        if isinstance(self.process, CONTEXT.Process):
            self.process.start()
        writer.close()
        self.reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self.reading.start()

    def _read(self, reader) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(reader.fileno(), 1 << 16):
                self.text += data.decode(errors="replace")
                self.heard = time.monotonic()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> bool:
        """SIGKILL; whether that was what ended it."""
        self.send(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self, limit: float = 600) -> int | None:
        """The exit code; None if it says nothing for a minute, or runs for longer than `limit`, and is killed."""
        start = time.monotonic()
        while (code := self.poll()) is None:
            now = time.monotonic()
            if now - self.heard > SILENCE or now - start > limit:
                self.send(signal.SIGKILL)
                return None
            time.sleep(0.01)
        self.reading.join(5)
        return code

    def end(self, limit: float = 600) -> tuple[str, str]:
        """ "done", "refused", "unclear" or "hung", and its line of error or last words."""
        code = self.wait(limit)
        lines = self.text.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        tail = " | ".join(lines[-4:])[-600:]
        if code is None:
            return "hung", tail
        if "Traceback" in self.text or "Fatal Python" in self.text:
            return "unclear", tail
        if code == 0:
            return "done", tail
        return ("refused", errors[0]) if code == 2 and len(errors) == 1 else ("unclear", f"exit code {code}: {tail}")


class Door(Process):
    """One of the doors of dar_jax; `fresh` starts it as a user does."""

    def __init__(self, module: str, *flags: str, fresh: bool = False, **environment: str):
        if not fresh:
            super().__init__(_door, module, list(flags), environment)
            return
        command, environment = [sys.executable, "-m", f"dar_jax.{module}", *flags], {**os.environ, **environment}
        pipes = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": environment, "cwd": ROOT}
        self._start(lambda output: subprocess.Popen(command, stdout=output.fileno(), **pipes))
        self.poll = self.process.poll


def ask(function: Callable, *args: Any) -> Any:
    """What `function` returns in a process of its own, as JSON."""
    process = Process(_answer, function, args)
    if process.wait() != 0:
        raise RuntimeError(f"{function.__name__}: {process.text}")
    return json.loads(process.text.rpartition(MARK)[2].partition("\n")[0])


def _answer(function: Callable, args: tuple) -> None:
    send(function(*args))


def send(answer: Any) -> None:
    """Writes a line to whom started this process, at once, because other threads print too."""
    os.write(1, f"\n{MARK}{json.dumps(answer)}\n".encode())
