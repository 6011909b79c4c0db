"""Tests run on eight host devices of the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"  # most of the time of these tests is compilation
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
