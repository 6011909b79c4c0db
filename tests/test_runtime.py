"""How a door finds the other processes of its job. What follows is tested in integration/test_many_processes.py."""

import os
import platform
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from dar_jax import hosts, runtime
from dar_jax.errors import UserError

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def start(monkeypatch):
    """Calls runtime.start in an environment; returns the arguments of hosts.join and jax.distributed.initialize."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def call(mode, environment):
        calls = []
        for name in BY_HAND:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        monkeypatch.setattr(jax.distributed, "initialize", lambda *job, **_: calls.append(job))
        monkeypatch.setattr(hosts, "join", lambda *job: calls.append(job))
        monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)  # which would hold for all tests after this one
        with flagsaver.flagsaver(distributed=mode):
            runtime.start()
        return calls

    return call


def test_modes(start):
    assert start("off", BY_HAND) == []
    assert start("auto", {}) == []  # no job: the process runs alone
    assert start("on", BY_HAND) == [("localhost:1", 2, 1, 300), ("localhost:1", 2, 1)]
    for mode, environment in (("on", {}), ("auto", {"JAX_COORDINATOR_ADDRESS": "localhost:1"})):
        with pytest.raises(UserError, match=rf"--distributed={mode}: no job of several processes was found.* launch/"):
            start(mode, environment)


@pytest.mark.parametrize("missing", BY_HAND)
def test_half_an_environment_is_an_error(start, missing):
    with pytest.raises(UserError, match="set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        start("auto", {name: value for name, value in BY_HAND.items() if name != missing})


def test_an_environment_that_makes_no_sense_is_an_error(start):
    with pytest.raises(UserError, match='JAX_PROCESS_ID = "one" in the environment is no number'):
        start("auto", {**BY_HAND, "JAX_PROCESS_ID": "one"})
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID = 2 .* less than JAX_NUM_PROCESSES = 2"):
        start("auto", {**BY_HAND, "JAX_PROCESS_ID": "2"})
    with pytest.raises(UserError, match=r'JAX_COORDINATOR_ADDRESS = "node1" .* must be HOST:PORT'):
        start("auto", {**BY_HAND, "JAX_COORDINATOR_ADDRESS": "node1"})


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


def test_devices_of_a_cpu_have_threads_to_wait_on(start, monkeypatch):
    """With fewer, the collectives of a step wait for each other forever once in some ten runs on two cores."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "998")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=999")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    start("off", {})
    assert os.environ["PJRT_NPROC"] == "1996"
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    for flags_of_xla, own, threads in (
        ("--xla_force_host_platform_device_count=999", None, "1998"),
        ("--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=999", None, "1998"),
        ("--xla_force_host_platform_device_count=1", None, str(max(2, os.cpu_count()))),
        ("--xla_force_host_platform_device_count=999", "3", "3"),
        ("", None, None),
    ):
        monkeypatch.setenv("XLA_FLAGS", flags_of_xla)
        monkeypatch.delenv("PJRT_NPROC", raising=False)
        if own:
            monkeypatch.setenv("PJRT_NPROC", own)
        start("off", {})
        assert os.environ.get("PJRT_NPROC") == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_freed_memory_is_kept_on_a_cpu():
    """The 80 MB of temporaries of a computation touch their 20,000 pages once, and not anew in every call."""
    script = """if True:
        import resource
        import jax
        from dar_jax import runtime
        runtime.keep_freed_memory()
        assert not jax.config.read("jax_cpu_enable_async_dispatch")
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        twice = lambda x: jax.numpy.cumsum(jax.numpy.flip(jax.numpy.cumsum(x, axis=1), 0), axis=0)
        compute = jax.jit(lambda x: twice(x * jax.numpy.ones((1000, 20_000)))[3, 5])
        assert compute.lower(1.0).compile().memory_analysis().temp_size_in_bytes >= 80e6
        compute(1.0)
        before = faults()
        for _ in range(3):
            compute(1.0)
        print(faults() - before)
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    assert int(subprocess.check_output([sys.executable, "-c", script], env=environment)) < 1000
