"""Trains a model: python -m dar_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be overridden: --config.train.num_steps=100. A workdir that holds checkpoints resumes.
"""

import signal
import sys

from absl import flags
from ml_collections import config_flags

from dar_jax import cli, runtime

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
PROFILE = flags.DEFINE_integer(
    "profile", 0, "Write a trace of so many steps, after ten, to workdir/profile", lower_bound=0
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, samples and metrics; created if missing")


def main(_):
    cli.require_flags(config=CONFIG.value, workdir=WORKDIR.value)
    signal.signal(signal.SIGTERM, _stop)  # until the loop listens; the imports take seconds
    if runtime.start() == 1:  # of several processes jax.distributed listens, and tells all
        signal.signal(signal.SIGTERM, _stop)
    from dar_jax.training.loop import train
    from dar_jax.validate import validate

    validate(CONFIG.value)
    train(CONFIG.value, WORKDIR.value, PROFILE.value)


def _stop(*_):
    print("stopped by a signal before the first step; the same command starts again", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    cli.run(main)
