"""What a run says: TensorBoard (clu), workdir/metrics.jsonl and a progress line."""

import json
import math
import pathlib
import time
from typing import Any

import jax

from dar_jax import files
from dar_jax.models.flops import peak_flops


def say(message: str) -> None:
    """Prints one line on the first process, at once."""
    if jax.process_index() == 0:
        print(message, flush=True)


class Logs:
    """Writes scalars of a run that starts after `first_step` steps and is `num_steps` long.

    A step takes `batch_size` images and, of the model's own matmuls, `flops_per_step`. Where the peak of the devices is
    known, their share of it is logged as "mfu".

    metrics.jsonl has one object a line: {"step": ..., "loss": ..., ...}. Lines of steps that a resumed run will
    take again are dropped, so the file reads as one uninterrupted run.
    """

    def __init__(self, workdir: str, first_step: int, num_steps: int, batch_size: int, flops_per_step: float):
        is_first = jax.process_index() == 0
        self.writer = _open_tensorboard(workdir) if is_first else None
        self.path = pathlib.Path(workdir) / "metrics.jsonl" if is_first else None
        self.num_steps, self.batch_size, self.flops_per_step = num_steps, batch_size, flops_per_step
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * jax.device_count()
        self.start_window(first_step)
        if is_first:
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            kept = [line for line in lines if _step(line) <= first_step]
            damaged = sum(math.isnan(_step(line)) for line in lines[:-1])  # a crash may have cut the last one
            if damaged:
                say(f"{self.path}: {damaged} damaged lines are left out")
            files.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def start_window(self, step: int) -> None:
        """Starts the measurement of speed anew, after time that was not training."""
        self.window_step, self.window_time = step, time.monotonic()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write_scalars(step, scalars)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **scalars}) + "\n")

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

    def close(self) -> None:
        if self.writer is not None:
            self.writer.flush()
            self.writer.close()


def _open_tensorboard(workdir: str) -> Any:
    """A writer of clu, or None and a line that says why there is none."""
    try:  # here, because it imports tensorflow, which takes seconds
        from clu import metric_writers
    except Exception as error:  # it is missing, or does not fit the rest, which it says in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"TensorBoard is off, and metrics.jsonl has all numbers ({reason})")
        return None
    return metric_writers.create_default_writer(workdir)


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl, NaN if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.nan
