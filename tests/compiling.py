"""The flags of XLA in tests, most of whose time is compilation, not what is compiled."""

# The newer emitters of fusions take more than twice as long.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# Devices of one host wait for each other, by default 40 seconds. On a busy machine that ended a process of tests.
PATIENTLY = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
FLAGS = f"{QUICKLY} {PATIENTLY}"
