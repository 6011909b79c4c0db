"""The kernels of GPUs as ptxas makes them for an H100, which need not be there: spills and registers."""

import glob
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "nvidia")),
    reason='needs the GPU compiler: pip install -e ".[plan_gpu]"',
)

# Text of XLA's GpuTargetConfigProto, as published of an H100 SXM.
H100 = """
gpu_device_info {
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 10 patch: 0 }  device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Of the passes over the history, queries and features; of the input of a sublayer, recent sources and features.
HISTORY = ((1, 1152), (4, 768), (4, 1152), (8, 1152), (14, 1152), (4, 2304), (8, 2304), (4, 3072), (8, 3072))
INPUTS = ((0, 1152), (1, 1152), (3, 1152), (7, 1152), (13, 1152), (3, 2304), (3, 3072))
SPILLED = {"cotangents_13_1152": 76}  # bytes of a thread: a chunk of 14 has more outputs than registers hold
KERNELS = 3 * len(HISTORY) + 2 * len(INPUTS)


@needs_compiler
def test_kernels_do_not_spill_on_an_h100(tmp_path):
    """But one. Nor does any take more registers than two blocks of four warps, or one of 16, may have."""
    command = [sys.executable, "-m", "tests.routing.test_gpu_compiler", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to={tmp_path} {_cuda_flag()}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, _, _, _ in found}) == KERNELS
    assert not [line for line in found if int(line[2]) > SPILLED.get(line[0], 0)]
    assert all(int(registers) * int(threads) <= 65536 // (2 if int(threads) == 128 else 1)
               for _, registers, _, threads in found)  # fmt: skip


def _cuda() -> pathlib.Path:
    (place,) = importlib.util.find_spec("nvidia").submodule_search_locations
    return pathlib.Path(place) / "cu13"


def _cuda_flag() -> str:
    return f"--xla_gpu_cuda_data_dir={_cuda()}"


def compile_all(folder: str) -> None:
    """Prints name, registers of a thread, bytes that it spills, and threads, of every kernel."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dar_jax.routing.kernels import gpu

    topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    b, t, k = 2, 64, 15

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    def report(name, function, *args):
        for path in glob.glob(f"{folder}/*"):
            os.remove(path)
        jax.jit(function).lower(*args).compile()
        for path in glob.glob(f"{folder}/*.ptx"):
            if ".entry" not in pathlib.Path(path).read_text():
                continue
            made = [_cuda() / "bin" / "ptxas", "-v", "-arch=sm_90a", path, "-o", f"{path}.cubin"]
            said = subprocess.run(made, capture_output=True, text=True, check=True).stderr
            pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
            for entry, spilled, registers in re.findall(pattern, said, re.S):
                if function.__name__ in entry:
                    threads = re.search(rf"{entry}\(.*?\.reqntid (\d+)", pathlib.Path(path).read_text(), re.S)[1]
                    print(name, registers, spilled, threads, flush=True)

    scalars, count = array(k, b, t, dtype=jnp.float32), array(dtype=jnp.int32)
    for q, d in HISTORY:
        u, rows, made = q * (array(b, 1, d),), array(k, b, t, d), q * (array(b, t, d),)
        sums = array(q, b, t, dtype=jnp.float32)
        report(f"forward_{q}_{d}", gpu.forward, u, rows, scalars, count)
        report(f"query_{q}_{d}", gpu.query_cotangent, u, rows, scalars, count, made, sums, made, sums)
        report(f"source_{q}_{d}", gpu.add_source_cotangent, rows, u, rows, scalars, count, sums, made, sums)
    for recent, d in INPUTS:
        values, u = (recent + 1) * (array(b, t, d),), (array(b, 1, d),) if recent else ()
        columns, modulation = (recent + 1) * (array(b, t, dtype=jnp.float32),), 2 * (array(b, 1, d),)
        args = u, values, columns, modulation
        report(f"input_{recent}_{d}", gpu.sublayer_input, *args)
        report(f"cotangents_{recent}_{d}", gpu.sublayer_input_cotangents, *args, (array(b, t, d),), values[1:])


if __name__ == "__main__":
    compile_all(sys.argv[1])
