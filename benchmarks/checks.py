"""What the checks of a run cost: whole runs with and without checksums, lock and seals, which take turns.

    python benchmarks/checks.py --config=configs/digits.py --config.train.num_steps=60

Every run logs each step, saves three times at least, and does not evaluate. Prints the processor time of a
run, summed over the cores, which other jobs disturb less than the time on the clock, and the ratio of medians.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from unittest import mock

import jax
from absl import app, flags
from ml_collections import config_flags

from dar_jax import files
from dar_jax.lock import Lock
from dar_jax.training import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed pairs of runs, after one to compile")


@contextlib.contextmanager
def without_checks():
    """Nothing is hashed or sealed, and the lock file is not looked at."""
    with (
        mock.patch.object(files, "checksums", lambda paths: ["0" * 64 for _ in paths]),
        mock.patch.object(files, "seal", lambda content: content),
        mock.patch.object(Lock, "lost", lambda self: None),
    ):
        yield


def seconds_of_a_run(config) -> tuple[float, float]:
    """Processor time and time on the clock."""
    with tempfile.TemporaryDirectory() as workdir:
        start = time.process_time(), time.monotonic()
        loop.train(config, workdir)
        return time.process_time() - start[0], time.monotonic() - start[1]


def main(_):
    config = CONFIG.value
    config.train.log_every_steps, config.eval.every_steps = 1, 0
    config.checkpoint.every_steps = min(config.checkpoint.every_steps, config.train.num_steps // 3)
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        found = {"with": [], "without": []}
        for _ in range(ROUNDS.value + 1):
            for name, context in (("with", contextlib.nullcontext()), ("without", without_checks())):
                with context, contextlib.redirect_stdout(sys.stderr):
                    found[name].append(seconds_of_a_run(config))
    for i, clock in enumerate(("processor time", "clock")):
        times = {name: [pair[i] for pair in pairs[1:]] for name, pairs in found.items()}
        medians = {name: statistics.median(values) for name, values in times.items()}
        text = ", ".join(f"{name} {medians[name]:.2f} s ({min(v):.2f} to {max(v):.2f})" for name, v in times.items())
        print(f"{clock}: {text}, ratio {medians['with'] / medians['without']:.3f}")


if __name__ == "__main__":
    app.run(main)
