"""Compares our train step and one sampling evaluation with a PyTorch SiT of the same size, on the same CPU.

    python benchmarks/against_torch.py --size=S --batch_size=4 --threads=2

The two sides take turns. The PyTorch side is the independent SiT of tests/parity, which needs the extra `test`. It is
as quick as PyTorch makes it: fused attention (`F.scaled_dot_product_attention`), `F.layer_norm`, tanh-GELU in one
kernel, tokens made contiguous after the patch embedding, AdamW with `fused=True`, the EMA by `torch._foreach_lerp_`,
and sampling under `inference_mode`. A train step is the same on both sides: it draws noise, times and dropped labels,
and computes the velocity loss, its gradients, AdamW and the EMA. Both sides compute in float32 with `--threads`
threads.

Prints medians over the rounds and their ratios to PyTorch, and --json writes the same. Quiet the machine first, because
the threads of PyTorch wait for each other and suffer most from other jobs. On a machine that cannot be quieted,
--threads=1 --clock=process_time compares the work of one core.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for tests.parity

import step_time

from dar_jax import config as config_lib
from tests.parity import torch_sit

THREADS = flags.DEFINE_integer("threads", 2, "Threads of each side; our side is pinned to as many cores")
flags.FLAGS.set_default("cases", ["residual", "static_t:4"])


class TorchCase:
    """The PyTorch model with its optimizer state and EMA, in a dict like that of `step_time.make_case`."""

    def __init__(self, size: str, batch_size: int):
        fields = {"input_size": 32, "channels": 4, "num_classes": 1000, "patch_size": 2, "learn_sigma": False}
        self.model = torch_sit.randomise(torch_sit.SiT(**fields, **config_lib.SIZES[size]))
        self.model.x_embedder.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=True)
        self.x, self.y = torch.randn(batch_size, 4, 32, 32), torch.zeros(batch_size, dtype=torch.long)
        self.times = {"step_seconds": [], "evaluation_seconds": []}

    def step(self) -> None:
        t, noise = torch.rand(len(self.x)), torch.randn_like(self.x)
        y = torch.where(torch.rand(len(self.y)) < 0.1, 1000, self.y)
        x_t = torch.lerp(noise, self.x, t[:, None, None, None])
        loss = (self.model(x_t, t, y) - (self.x - noise)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, self.params, 1e-4)

    @torch.inference_mode()
    def evaluate(self) -> None:
        self.model(self.x, torch.full((len(self.x),), 0.5), self.y)

    def run_once(self) -> None:
        clock = getattr(time, step_time.CLOCK.value)
        for name, run in (("step_seconds", self.step), ("evaluation_seconds", self.evaluate)):
            start = clock()
            run()
            self.times[name].append(clock() - start)


def main(_):
    if step_time.DTYPE.value != "float32":
        raise app.UsageError(f'--dtype = "{step_time.DTYPE.value}": PyTorch runs in float32 here.')
    torch.set_num_threads(THREADS.value)
    # XLA starts as many threads as it may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])
    reference = TorchCase(step_time.SIZE.value, step_time.BATCH_SIZE.value)
    cases = {name: step_time.make_case(name) for name in step_time.CASES.value}
    for _ in range(step_time.ROUNDS.value + 1):
        for run in [reference.run_once, *(lambda case=case: step_time.run_once(case) for case in cases.values())]:
            time.sleep(0.1)  # until the threads of the previous case have stopped spinning
            run()

    rows = []
    for name, times in {"pytorch": reference.times, **cases}.items():
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
