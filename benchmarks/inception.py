"""Measures Inception features per second, here and in PyTorch, with the same random weights, images and CPU.

    python benchmarks/inception.py --batch_size=16 --rounds=7 --json=inception.json

The rounds take turns, and the ratio is that of the medians. PyTorch runs in both memory layouts, contiguous and
channels last. Each case is timed from images that are already resized and on the device. Run this from the root of a
clone, with the extra `test`.
"""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for the PyTorch network in tests/parity

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from dar_jax.pretrained import inception
from tests.parity.torch_inception import random_inception

BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images at a time")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds over all cases, after one to warm up")
JSON = flags.DEFINE_string("json", None, "Where to write the result")


def main(_):
    network = random_inception()
    params = jax.device_put(inception.params_from_torch(network.state_dict()))
    x = np.random.default_rng(0).uniform(-1, 1, (BATCH_SIZE.value, 299, 299, 3)).astype(np.float32)
    apply = jax.jit(lambda params, x: inception.InceptionV3().apply({"params": params}, x))
    ours = jnp.asarray(x)
    contiguous = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    channels_last = contiguous.to(memory_format=torch.channels_last)
    cases = {
        "dar_jax": lambda: jax.block_until_ready(apply(params, ours)),
        "torch": lambda: network(contiguous),
        "torch channels last": lambda: network(channels_last),
    }
    seconds = {name: [] for name in cases}
    with torch.inference_mode():
        for _ in range(ROUNDS.value + 1):
            for name, run in cases.items():
                start = time.monotonic()
                run()
                seconds[name].append(time.monotonic() - start)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    result = {
        "batch_size": BATCH_SIZE.value,
        "rounds": ROUNDS.value,
        "threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "features_per_second": {name: BATCH_SIZE.value / median for name, median in medians.items()},
        "seconds": {name: times[1:] for name, times in seconds.items()},
        "ratio_to_faster_torch": min(medians["torch"], medians["torch channels last"]) / medians["dar_jax"],
    }
    print(f"InceptionV3, batch {BATCH_SIZE.value}, float32, {torch.get_num_threads()} threads")
    for name, speed in result["features_per_second"].items():
        print(f"{name:22}{speed:8.2f} features/s")
    print(f"dar_jax runs at {result['ratio_to_faster_torch']:.2f} x the faster PyTorch")
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
