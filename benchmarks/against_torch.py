"""Compares our train step and one sampling evaluation with a PyTorch SiT of the same size, on the same CPU.

    python benchmarks/against_torch.py --size=S --batch_size=4 --threads=2

The two sides take turns. torch_case.py has the PyTorch side. A train step is the same on both sides. Both compute in
float32 with `--threads` threads.

Prints medians over the rounds and their ratios to PyTorch, and --json writes the same. Quiet the machine first, because
the threads of PyTorch wait for each other and suffer most from other jobs. On a machine that cannot be quieted,
--threads=1 --clock=process_time compares the work of one core.
"""

import json
import os
import pathlib
import time

import numpy as np
import step_time
import torch
from absl import app, flags
from torch_case import TorchCase

from dar_jax import runtime

THREADS = flags.DEFINE_integer("threads", 2, "Threads of each side; our side is pinned to as many cores")
flags.FLAGS.set_default("cases", ["residual", "static_t:4"])


def run_once(case: TorchCase, times: dict[str, list[float]]) -> None:
    clock = getattr(time, step_time.CLOCK.value)
    for name, run in (("step_seconds", case.step), ("evaluation_seconds", case.evaluate)):
        start = clock()
        run()
        times[name].append(clock() - start)


def main(_):
    runtime.keep_freed_memory()  # as every command does
    if step_time.DTYPE.value != "float32":
        raise app.UsageError(f'--dtype = "{step_time.DTYPE.value}": PyTorch runs in float32 here.')
    torch.set_num_threads(THREADS.value)
    # XLA starts as many threads as it may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])
    shape = step_time.SIZE.value, step_time.BATCH_SIZE.value
    reference, reference_times = TorchCase(*shape), {"step_seconds": [], "evaluation_seconds": []}
    cases = {
        name: step_time.make_case(name, *shape, "float32", step_time.REMAT.value) for name in step_time.CASES.value
    }  # fmt: skip
    for _ in range(step_time.ROUNDS.value + 1):
        for run in [
            lambda: run_once(reference, reference_times),
            *(lambda case=case: step_time.run_once(case) for case in cases.values()),
        ]:
            time.sleep(0.1)  # until the threads of the previous case have stopped spinning
            run()

    rows = []
    for name, times in {"pytorch": reference_times, **cases}.items():
        step, evaluation = (1e3 * float(np.median(times[k][1:])) for k in ("step_seconds", "evaluation_seconds"))
        first = rows[0] if rows else {"step_ms": step, "evaluation_ms": evaluation}
        rows.append(
            {
                "case": name,
                "step_ms": step,
                "step_ratio": step / first["step_ms"],
                "evaluation_ms": evaluation,
                "evaluation_ratio": evaluation / first["evaluation_ms"],
            }
        )
    print(f"SiT-{step_time.SIZE.value}/2, batch {step_time.BATCH_SIZE.value}, float32, {THREADS.value} threads")
    print(f"{'case':14}{'step':>9}{'ratio':>7}{'evaluation':>12}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['case']:14}{row['step_ms']:6.0f} ms{row['step_ratio']:7.2f}{row['evaluation_ms']:9.0f} ms"
            f"{row['evaluation_ratio']:7.2f}"
        )
    if step_time.JSON.value:
        pathlib.Path(step_time.JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
