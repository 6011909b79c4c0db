"""Times one measurement of config.diagnosis and one train step, which take turns.

    python benchmarks/diagnosis.py --config=configs/digits.py --config.model.depth=12

Prints medians, and the smallest config.diagnosis.every_steps with which diagnosis takes less than 1 % of the time.
--json writes the same.
"""

import json
import math
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from dar_jax import models, sharding
from dar_jax.data.feed import abstract_batch
from dar_jax.diagnosis.curves import InlineDiagnosis
from dar_jax.training.setup import build_algorithm, set_up

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
ROUNDS = flags.DEFINE_integer("rounds", 12, "Timed rounds, after one to warm up")
JSON = flags.DEFINE_string("json", None, "Where to write the result")


def main(_):
    config = CONFIG.value
    model, mesh = models.build(config.model), sharding.make_mesh(config.mesh)
    seconds = {"step": [], "diagnosis": []}
    with sharding.use(mesh):
        run = set_up(config, build_algorithm(config), mesh)
        state, diagnosis = run.init(), InlineDiagnosis(config, model, mesh)
        batch = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract_batch(config, mesh)
        )
        for _ in range(ROUNDS.value + 1):
            start = time.monotonic()
            state, _ = jax.block_until_ready(run.step(state, (), batch))
            seconds["step"].append(time.monotonic() - start)
            start = time.monotonic()
            diagnosis.run(state.params)
            seconds["diagnosis"].append(time.monotonic() - start)
    median = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    steps = math.ceil(99 * median["diagnosis"] / median["step"])
    print(f"train step of {config.train.batch_size} images: {1e3 * median['step']:.0f} ms")
    print(f"diagnosis of {config.diagnosis.num_images} images: {1e3 * median['diagnosis']:.0f} ms")
    print(f"under 1 % of the time from config.diagnosis.every_steps={steps} on")
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump({"median_seconds": median, "every_steps": steps}, file, indent=2)


if __name__ == "__main__":
    app.run(main)
