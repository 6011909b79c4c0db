"""Tests that compile for TPUs which are not there."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[plan]"'
)


def printed_with_libtpu(module: str, *, timeout: float) -> list[str]:
    """The words that `python -m module` prints, within `timeout` seconds.

    It is a process of its own, because what libtpu reads from the environment must be there before jax starts.
    XLA_FLAGS are left out, because libtpu ends the process at one that it does not know.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = {**inherited, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {"TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()
