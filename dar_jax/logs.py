"""What a run says: TensorBoard (clu), workdir/metrics.jsonl and a progress line."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from dar_jax import files
from dar_jax.errors import UserError
from dar_jax.models.flops import peak_flops


def say(message: str) -> None:
    """Prints one line on the first process, at once."""
    if jax.process_index() == 0:
        try:
            print(message, flush=True)
        except OSError:  # a terminal or a pipe that is gone is no reason to end a run
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if there is no such file. Damaged ones are left out, and a line says so."""
    path = files.path(workdir) / "metrics.jsonl"
    lines = files.read_text(path).splitlines() if path.is_file() else []
    found = [_parse(line) for line in lines]
    if damaged := found.count(None):
        say(f"{path}: {damaged} lines that are damaged, or that a crash cut short, are left out")
    return [line for line in found if line is not None]


def _parse(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged."""
    with contextlib.suppress(ValueError):
        content = json.loads(line)
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            return files.unseal(content)
    return None


class Logs:
    """Writes scalars of a run that starts after `first_step` steps and is `num_steps` long.

    A step takes `batch_size` images and, of the model's own matmuls, `flops_per_step`. Where the peak of the devices is
    known, their share of it is logged as "mfu".

    metrics.jsonl has one object a line: {"step": ..., "loss": ..., ...}. Lines of steps that a resumed run will
    take again are dropped, so the file reads as one uninterrupted run.
    """

    def __init__(self, workdir: str, first_step: int, num_steps: int, batch_size: int, flops_per_step: float):
        is_first = jax.process_index() == 0
        self.mirror = files.Mirror(workdir)
        self.writer = _open_tensorboard(str(self.mirror.directory)) if is_first else None
        self.path = self.mirror.directory / "metrics.jsonl" if is_first else None
        self.num_steps, self.batch_size, self.flops_per_step = num_steps, batch_size, flops_per_step
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * jax.device_count()
        self.start_window(first_step)
        written = files.path(workdir) / "metrics.jsonl"
        if written.exists() and not written.is_file():  # a pipe would be waited for
            raise UserError(f'"{written}" is no file; remove it.')
        if self.path is not None and self.path != written and written.exists():
            self.path.write_text(written.read_text())
        self.drop(lambda line: line["step"] > first_step)

    def say_what_is_missing(self, first_step: int, every_steps: int) -> None:
        """Says so if the last lines before `first_step` are gone, of a run that logs every `every_steps` steps."""
        if self.path is None:
            return
        steps = [0, *(line["step"] for line in read_metrics(self.path.parent) if "loss" in line)]
        widest = max((b - a for a, b in itertools.pairwise(steps)), default=0)
        if first_step >= steps[-1] + max(widest, every_steps):
            say(f"{self.path} is damaged: it has no lines of steps {steps[-1] + 1} to {first_step}")

    def start_window(self, step: int) -> None:
        """Starts the measurement of speed anew, after time that was not training."""
        self.window_step, self.window_time = step, time.monotonic()

    def drop(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Removes lines of metrics.jsonl, and puts the others in the order of their steps."""
        if self.path is not None and self.path.is_file():
            kept = sorted((line for line in read_metrics(self.path.parent) if not which(line)), key=lambda x: x["step"])
            files.write_text(self.path, "".join(json.dumps(files.seal(line)) + "\n" for line in kept))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write_scalars(step, scalars)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(files.seal({"step": step, **scalars})) + "\n")
            self.mirror.push_sometimes()

    def progress(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars with the speed since the window started, and prints the progress line.

        The line shows the scalars whose name begins with "loss".
        """
        if step > self.window_step:
            speed = (step - self.window_step) / (time.monotonic() - self.window_time)
            scalars = {**scalars, "steps_per_second": speed, "images_per_second": speed * self.batch_size}
            scalars["model_tflops_per_second"] = speed * self.flops_per_step / 1e12
            if self.peak_flops:
                scalars["mfu"] = speed * self.flops_per_step / self.peak_flops
            mfu = f"  MFU {100 * scalars['mfu']:.1f} %" if self.peak_flops else ""
            eta = (self.num_steps - step) / speed
            clock = f"{int(eta // 3600)}:{int(eta // 60 % 60):02d}:{int(eta % 60):02d}"
            losses = "  ".join(f"{name} {value:.4f}" for name, value in scalars.items() if name.startswith("loss"))
            say(
                f"step {step}/{self.num_steps}  {losses}  {speed:.3g} steps/s  "
                f"{scalars['images_per_second']:.4g} images/s{mfu}  ETA {clock}"
            )
        self.write(step, scalars)
        self.start_window(step)

    def flush(self) -> None:
        """Returns when all that was written is in the workdir."""
        if self.writer is not None:
            self.writer.flush()
        self.mirror.push()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.flush()
            self.writer.close()
        self.mirror.close()


def _open_tensorboard(directory: str) -> Any:
    """A writer of clu, or None and a line that says why there is none."""
    try:  # here, because it imports tensorflow, which takes seconds
        from clu import metric_writers
    except Exception as error:  # it is missing, or does not fit the rest, which it says in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"TensorBoard is off, and metrics.jsonl has all numbers ({reason})")
        return None
    return metric_writers.create_default_writer(directory)
