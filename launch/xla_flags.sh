# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the scripts that source this file
# What the compiler is told on each platform, and why. An unknown flag ends the program at its start, so every flag here
# is tested against the installed jaxlib and libtpu (tests/launch/test_xla_flags.py). What the environment already holds
# comes after these and wins: LIBTPU_INIT_ARGS="--xla_..." or XLA_FLAGS="--xla_...".

# TPU (LIBTPU_INIT_ARGS). With config.mesh.fsdp, each layer's weights are gathered from all chips before use. The
# first four are needed for a gather to run beside the matmuls of the layer before: without any one of them the v5e compiler
# overlaps none. These are the defaults of libtpu 0.0.42 and 0.0.52; written down, so that another default shows up in a
# diff here and not in a slower run.
tpu_flags=(
  # The gather becomes an asynchronous operation, with a start and an end.
  --xla_enable_async_all_gather=true
  # It is fused with the matmuls beside it, whose loop moves its data along.
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  # One gather may stretch over several such fusions: a layer's weights outlast one matmul.
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # The tensor core computes while the links transfer.
  --xla_tpu_overlap_compute_collective_tc=true
  # By default the compiler multiplies with the parts of a gathered matrix as they come in. With fsdp = 16 the parts of
  # SiT-XL are 72 wide, where the matrix unit takes 128: planned for v5e:4x4 at batch 128, the residual step takes 128 ms
  # so, and 68 with whole matrices. (A number of MiB beyond all matrices switches it off.)
  --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
)

# GPU (XLA_FLAGS). Both are off by default in jax 0.10. Matmuls by Triton, pipelined reduce-scatters and a stream of
# high priority for collectives are on by default and need no flag.
gpu_flags=(
  # Orders operations so that collectives run under compute; without it a gather of weights is waited for.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # In the scan over layers, starts the gather of the next layer's weights during this one; a scheduler alone cannot
  # move work across iterations.
  --xla_gpu_enable_pipelined_all_gather=true
)
