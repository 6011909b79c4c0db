"""Tests run on eight host devices of the CPU."""

import os

from dar_jax import runtime
from tests import compiling

os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {compiling.FLAGS}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
runtime.give_devices_threads()
