"""Times one aggregation over N sources, forward and backward: ours and the plain form, which take turns.

    python benchmarks/aggregation.py --query=dynamic --json=aggregation.json

The plain form is what one writes first: RMSNorm of all sources, dot products, softmax, weighted sum, and autodiff. Ours
is `routing.read` as it runs on the devices of this machine. It is given 1 / rms, which a stack stores with every
source.

Prints medians and their ratio. Also prints the bytes that the fused kernels move by design, which is no measurement.
They read every source once in the forward pass, and read it twice and write its cotangent in the backward pass.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from cases import both_ways, lean, plain

from dar_jax.routing import inverse_rms

NUM_SOURCES = flags.DEFINE_list("num_sources", ["1", "2", "4", "8", "15", "29", "57"], "Numbers of sources, N")
QUERY = flags.DEFINE_enum("query", "static_t", ["static_t", "dynamic"], "One query per sample, or one per token")
SHAPE = flags.DEFINE_list("shape", ["4", "256", "384"], "Samples, tokens and features")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the sources")
IMPLEMENTATION = flags.DEFINE_enum("implementation", "auto", ["auto", "xla", "pallas"], "As in config.model.routing")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed rounds, after one to warm up")
JSON = flags.DEFINE_string("json", None, "Where to write the result")


def main(_):
    batch, tokens, size = map(int, SHAPE.value)
    itemsize = jnp.dtype(DTYPE.value).itemsize
    rows = []
    for n in map(int, NUM_SOURCES.value):
        keys = jax.random.split(jax.random.key(n), 3)
        u = jax.random.normal(keys[0], (batch, tokens if QUERY.value == "dynamic" else 1, size)) * size**-0.5
        sources = jax.random.normal(keys[1], (n, batch, tokens, size)).astype(DTYPE.value)
        g = jax.random.normal(keys[2], (batch, tokens, size)).astype(DTYPE.value)
        calls = {}
        for name, form in (
            ("plain", plain),
            ("ours", functools.partial(lean, IMPLEMENTATION.value, inverse_rms(sources))),
        ):
            calls[name, "forward"] = functools.partial(jax.jit(form), u, sources)
            calls[name, "both"] = functools.partial(jax.jit(functools.partial(both_ways, form)), u, sources, g)
        seconds = {key: [] for key in calls}
        for _ in range(ROUNDS.value + 1):
            for key, call in calls.items():
                jax.block_until_ready(call())  # the memory of the previous call goes back to the system here
                start = time.monotonic()
                jax.block_until_ready(call())
                seconds[key].append(time.monotonic() - start)
        median = {key: 1e3 * float(np.median(times[1:])) for key, times in seconds.items()}
        one = batch * tokens * size * itemsize
        row = {"num_sources": n, "kernel_bytes_forward": (n + 1) * one, "kernel_bytes_backward": (4 * n + 4) * one}
        for part in ("forward", "both"):
            row |= {f"{name}_{part}_ms": median[name, part] for name in ("plain", "ours")}
            row[f"{part}_ratio"] = median["plain", part] / median["ours", part]
        rows.append(row)

    print(f"{QUERY.value}, {DTYPE.value} {SHAPE.value}, {jax.devices()[0].device_kind}; ratios are plain / ours")
    print(f"{'N':>4}{'forward: plain':>16}{'ours':>9}{'ratio':>7}{'both: plain':>15}{'ours':>9}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['num_sources']:4}{row['plain_forward_ms']:13.2f} ms{row['ours_forward_ms']:6.2f} ms"
            f"{row['forward_ratio']:7.2f}{row['plain_both_ms']:12.2f} ms{row['ours_both_ms']:6.2f} ms"
            f"{row['both_ratio']:7.2f}"
        )
    last = rows[-1]
    print(
        f"By design the kernels move {last['kernel_bytes_forward'] / 1e6:.1f} MB forward and "
        f"{last['kernel_bytes_backward'] / 1e6:.1f} MB backward at N = {last['num_sources']}."
    )
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    app.run(main)
