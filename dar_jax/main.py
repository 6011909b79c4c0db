"""Trains a model: python -m dar_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be overridden: --config.train.num_steps=100. A workdir that holds checkpoints continues
from the latest one.
"""

import os
import signal
import sys

from absl import flags
from ml_collections import config_flags

from dar_jax import cli, hosts, runtime

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
PROFILE = flags.DEFINE_integer(
    "profile", 0, "Write a trace of this many steps to workdir/profile, after the first ten", lower_bound=0
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of checkpoints, samples and metrics; created if missing")


def main(_):
    cli.require_flags(config=CONFIG.value, workdir=WORKDIR.value)
    _listen(_end, signal.SIGTERM, signal.SIGHUP)  # the imports take seconds, and only then does the loop listen
    alone = runtime.start() == 1
    # Of several processes one asks all to stop, which they do before the first step that none has begun.
    _listen(_end if alone else hosts.ask_to_stop, signal.SIGTERM)
    from dar_jax.training.loop import train
    from dar_jax.validate import validate

    _listen(_leave, signal.SIGHUP, *([signal.SIGTERM] if alone else []))
    validate(CONFIG.value)
    train(CONFIG.value, WORKDIR.value, PROFILE.value)


def _listen(handler, *signals):
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, handler)


def _leave(*_):
    print("stopped by a signal before the first step; the same command starts again", flush=True)
    sys.exit(0)


def _end(*_):
    """Ends within an import, where an exception may come out as another one; a job must hear of it."""
    try:
        _leave()
    finally:
        if not hosts.is_joined():
            os._exit(0)


if __name__ == "__main__":
    cli.run(main)
