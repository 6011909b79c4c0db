"""GPUs that need not be here: XLA's own compiler takes a description of them, and needs neither a GPU nor a driver.

Memory and collectives are the compiler's, and so is the time of fusions that hold no matmul. Of matmuls and kernels the
planner takes a roofline.
"""

import importlib.util
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dar_jax import files
from dar_jax.errors import UserError

# On a machine without a GPU nothing can be tuned, and the default flags then find no tile sizes for some matmuls.
UNTUNED = "--xla_gpu_experimental_cost_model_gemm_tiling_options=top=1"
ESTIMATES = "--xla_gpu_collect_cost_model_stats=true"
USABLE = 0.75  # of the memory, which jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise


class Gpu(NamedTuple):
    """Published figures of a GPU, in the units of XLA's GpuDeviceInfo."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes/s
    major: int  # compute capability, major.0
    cores: int
    shared: int  # bytes of shared memory per core
    shared_optin: int  # bytes of it that a block may ask for
    fpus: int  # per core
    l2: int  # bytes
    clock: float  # GHz


_HOPPER = {"major": 9, "cores": 132, "shared": 233472, "shared_optin": 232448}
_HOPPER |= {"fpus": 128, "l2": 50 * 2**20, "clock": 1.98}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3352.32e9, **_HOPPER),
    "h200": Gpu("NVIDIA H200", 150_754_820_096, 4800e9, **_HOPPER),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 84_987_740_160, 2039e9, 8, 108, 167936, 166912, 64, 40 * 2**20, 1.41),
}


def compiler() -> files.Path | None:
    """The folder of ptxas and libdevice; None: it is not installed."""
    found = importlib.util.find_spec("nvidia")
    places = [files.path(place) / "cu13" for place in (found.submodule_search_locations if found else ())]
    return next((place for place in places if (place / "bin" / "ptxas").exists()), None)


def flags() -> list[str]:
    """What XLA_FLAGS must hold before jax starts."""
    return [UNTUNED, ESTIMATES, *([f"--xla_gpu_cuda_data_dir={compiler()}"] if compiler() else [])]


def specification(kind: str) -> str:
    """Text of XLA's GpuTargetConfigProto."""
    gpu = GPUS[kind]
    features = " feature_extension: ACCELERATED_FEATURES" if gpu.major == 9 else ""
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {gpu.shared} threads_per_core_limit: 2048 core_count: {gpu.cores}
        fpus_per_core: {gpu.fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
        device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.shared_optin}
        cuda_compute_capability {{ major: {gpu.major}{features} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{gpu.name}" """


def devices(kind: str, per_host: int, hosts: int) -> list:
    """The abstract GPUs of `hosts` hosts. Raises UserError without the compiler."""
    if compiler() is None or not importlib.util.find_spec("jax_cuda13_plugin"):
        raise UserError(
            f'--topology = "{kind}:{per_host}" needs the GPU compiler: pip install -e ".[plan_gpu]" (Linux, x86-64).'
        )
    try:
        described, shape = specification(kind), f"1x{hosts}x{per_host}"
        return topologies.get_topology_desc("", platform="cuda", target_config=described, topology=shape).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology = "{kind}:{per_host}" is refused by XLA: {str(error).splitlines()[0]}') from error
