"""How a door finds the other processes of its job. What follows is tested in integration/test_many_processes.py."""

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from dar_jax import runtime
from dar_jax.errors import UserError

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def start(monkeypatch):
    """Calls runtime.start in an environment; returns the arguments of jax.distributed.initialize, or None."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def call(mode, environment, found=True):
        calls = []

        def initialize(**arguments):
            calls.append(arguments)
            if not found:
                raise ValueError("coordinator_address should be defined.")

        for name in BY_HAND:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        with flagsaver.flagsaver(distributed=mode):
            runtime.start()
        return calls[0] if calls else None

    return call


def test_modes(start):
    assert start("off", BY_HAND) is None
    assert start("auto", {}) == {}
    assert start("auto", {}, found=False) == {}  # no job: the process runs alone
    assert start("on", BY_HAND) == {"num_processes": 2, "process_id": 1}
    for mode, environment in (("on", {}), ("auto", {"JAX_COORDINATOR_ADDRESS": "localhost:1"})):
        with pytest.raises(UserError, match=rf"--distributed={mode}: no job of several processes was found .* launch/"):
            start(mode, environment, found=False)


@pytest.mark.parametrize("missing", BY_HAND)
def test_half_an_environment_is_an_error(start, missing):
    with pytest.raises(UserError, match="set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        start("auto", {name: value for name, value in BY_HAND.items() if name != missing})


def test_an_environment_that_makes_no_sense_is_an_error(start):
    with pytest.raises(UserError, match='JAX_PROCESS_ID = "one" in the environment is no number'):
        start("auto", {**BY_HAND, "JAX_PROCESS_ID": "one"})


def test_compiled_programs_are_kept_unless_told_where(start, monkeypatch):
    kept = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: kept.append((name, value)))
    start("off", {})
    assert kept == []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with flagsaver.flagsaver(distributed="off"):
        runtime.start()
    ((name, value),) = kept
    assert name == "jax_compilation_cache_dir" and value.endswith("dar_jax/xla") and "~" not in value
