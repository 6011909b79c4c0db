"""Tests that compile for GPUs which are not there."""

import importlib.util

import pytest

from dar_jax.planning import gpus

needs_gpu_compiler = pytest.mark.skipif(
    gpus.compiler() is None or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason='needs the GPU compiler: pip install -e ".[plan_gpu]"',
)
