"""How XLA compiles in tests: most of their time is compilation, not what is compiled."""

# The newer emitters of fusions take more than twice as long.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
