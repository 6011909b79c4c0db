"""Measures what routing costs: a train step and one sampling evaluation, for the residual and for routed models.

    python benchmarks/step_time.py --size=S --batch_size=4 --cases=residual,static_t:4,dynamic:4,static_t:1

The cases take turns. Prints medians, their ratios to the first case, and the temporary memory of the compiled step.
--json writes the same. Quiet the machine first, because the time of other jobs would look like the cost of routing.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags
from cases import make_case

from dar_jax import config as config_lib
from dar_jax import runtime

SIZE = flags.DEFINE_enum("size", "S", [*config_lib.SIZES], "Published size, patch 2, latents 32x32x4")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Images per step")
CASES = flags.DEFINE_list(
    "cases",
    ["residual", "static:4", "static_t:4", "dynamic:4", "static_t:1", "static_t:8"],
    "Each is variant or variant:chunk_size; ratios are to the first",
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the computation")
REMAT = flags.DEFINE_enum("remat", "dense", ["dense", "block"], "As in config.model")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds over all cases, after one to warm up")
CLOCK = flags.DEFINE_enum(
    "clock", "monotonic", ["monotonic", "process_time"], "Wall time, or less noisy processor time summed over threads"
)
JSON = flags.DEFINE_string("json", None, "Where to write the result")


def run_once(case: dict) -> None:
    clock = getattr(time, CLOCK.value)
    start = clock()
    case["state"], metrics = case["step"](case["state"], (), case["batch"])
    jax.block_until_ready((case["state"], metrics))
    case["step_seconds"].append(clock() - start)
    start = clock()
    jax.block_until_ready(case["evaluate"](case["state"].params, *case["batch"].values()))
    case["evaluation_seconds"].append(clock() - start)


def main(_):
    runtime.keep_freed_memory()  # as every command does
    cases = {
        name: make_case(name, SIZE.value, BATCH_SIZE.value, DTYPE.value, REMAT.value) for name in CASES.value
    }  # fmt: skip
    for _ in range(ROUNDS.value + 1):
        for case in cases.values():
            run_once(case)
    rows = []
    for name, case in cases.items():
        step, evaluation = (float(np.median(case[k][1:])) for k in ("step_seconds", "evaluation_seconds"))
        rows.append(
            {
                "case": name,
                "step_ms": 1e3 * step,
                "step_ratio": 1e3 * step / (rows[0]["step_ms"] if rows else 1e3 * step),
                "evaluation_ms": 1e3 * evaluation,
                "evaluation_ratio": 1e3 * evaluation / (rows[0]["evaluation_ms"] if rows else 1e3 * evaluation),
                "temp_bytes": case["temp_bytes"],
                "compile_seconds": case["compile_seconds"],
            }
        )
    print(f"SiT-{SIZE.value}/2, batch {BATCH_SIZE.value}, {DTYPE.value}, {jax.devices()[0].device_kind}")
    print(f"{'case':14}{'step':>9}{'ratio':>7}{'evaluation':>12}{'ratio':>7}{'temporaries':>13}{'compile':>9}")
    for row in rows:
        print(
            f"{row['case']:14}{row['step_ms']:6.0f} ms{row['step_ratio']:7.2f}{row['evaluation_ms']:9.0f} ms"
            f"{row['evaluation_ratio']:7.2f}{row['temp_bytes'] / 1e6:10.0f} MB{row['compile_seconds']:7.1f} s"
        )
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    app.run(main)
