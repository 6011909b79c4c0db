"""How a door starts jax: the other processes of its job, and the cache of compiled programs."""

import ctypes
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dar_jax import hosts
from dar_jax.errors import UserError

DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "One run of many processes: auto if a TPU pod, Slurm, MPI or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID say so; on makes it an error if none does; off runs alone",
)
JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", 300, "How long to wait for the other processes of the job", lower_bound=1
)
CACHE = pathlib.Path("~/.cache/dar_jax/xla")
# Libraries whose programs or files differ between versions.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ACCELERATORS = "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg"  # the last of WSL2
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_OWN_FLAGS = ("distributed", "join_seconds")  # may differ between the processes of a job


def start() -> int:
    """Joins the other processes of the job by --distributed, and returns how many there are.

    Compiled programs are kept for later runs in ~/.cache/dar_jax/xla, or in JAX_COMPILATION_CACHE_DIR (empty: nowhere).
    To be called before anything else of jax. Raises UserError if --distributed=on finds no job, the environment of the
    job makes no sense, other processes do not come, or their code, flags, config or devices differ from ours.
    """
    import jax

    keep_freed_memory()
    give_devices_threads()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
    if DISTRIBUTED.value != "off":
        _join_job()
    return jax.process_count()


def keep_freed_memory() -> None:
    """Keeps what XLA frees after every step on a CPU for the next one, where there is no accelerator.

    XLA allocates the temporaries of each call anew, and glibc returns what is freed to the kernel, which clears every
    page at its next use: 5 to 20 % of a step. glibc keeps memory of any size for the main thread alone, so computations
    run on that. To be called before jax starts threads. Without glibc, or beside an accelerator, it does nothing.
    """
    import jax

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    has_accelerator = os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, _ACCELERATORS))
    if mallopt and not has_accelerator:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def give_devices_threads() -> None:
    """Gives XLA two threads for each device that the environment makes of a CPU, unless PJRT_NPROC says how many.

    XLA_FLAGS may make several, and JAX_NUM_CPU_DEVICES, which jax puts first.

    By default XLA has one per core. Devices wait for each other on these threads, and when all of them wait, the
    devices that they wait for cannot run. To be called before jax starts threads.
    """
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    forced += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
    if forced:
        os.environ.setdefault("PJRT_NPROC", str(max(2 * int(forced[-1]), os.cpu_count() or 1)))


def _join_job() -> None:
    import jax
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize calls it, too late for us

    timeout = JOIN_SECONDS.value
    with hosts.reporting("the description of the job by the cluster", timeout):
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            *_by_hand(), None, None, int(timeout)
        )
    if None in (address, count, index):
        if address or DISTRIBUTED.value == "on":
            raise UserError(
                f"--distributed={DISTRIBUTED.value}: no job of several processes was found. Start it with "
                "launch/tpu_pod.sh or launch/slurm.sh, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID."
            )
        return
    hosts.join(address, count, index, timeout)
    hosts.agree(_facts(), "the comparison of code and config")
    with hosts.reporting("jax to connect the processes and their devices", timeout):
        jax.distributed.initialize(address, count, index, initialization_timeout=int(timeout) + 60)
        local = [device.device_kind for device in jax.local_devices()]
    hosts.agree({"devices": f"{len(local)} x {local[0]}"}, "the comparison of devices")


def _by_hand() -> tuple[str | None, int | None, int | None]:
    """What the environment says of the job. Raises UserError if that makes no sense."""
    address, numbers = os.environ.get("JAX_COORDINATOR_ADDRESS"), []
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise UserError(f'{name} = "{text}" in the environment is no number.')
        numbers.append(None if text is None else int(text))
    count, index = numbers
    if numbers != [None, None] and None in (address, count, index):
        raise UserError("set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none.")
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise UserError(f'JAX_COORDINATOR_ADDRESS = "{address}" in the environment must be HOST:PORT, as node1:8476.')
    if index is not None and index >= count:
        raise UserError(f"JAX_PROCESS_ID = {index} in the environment must be less than JAX_NUM_PROCESSES = {count}.")
    return address, count, index


def _facts() -> dict[str, Any]:
    """What all processes of a job must have in common, by the names that an error gives them."""
    package = pathlib.Path(__file__).parent
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    facts: dict[str, Any] = {"the code of dar_jax": sources.hexdigest()[:16]}
    facts |= {f"the version of {name}": importlib.metadata.version(name) for name in _LIBRARIES}
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, ConfigDict):
            facts |= {f"{name}.{field}": x for field, x in _flat(value.to_dict())}
        elif name not in _OWN_FLAGS and not name.startswith("config."):  # those are in the config
            facts[f"--{name}"] = value
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        words = os.environ.get(name, "").split()
        facts[name] = " ".join(word for word in words if not word.startswith("--xla_dump"))
    return facts


def _flat(section: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """The fields of a config with their whole names, as "train.num_steps"."""
    return [
        field
        for name, value in section.items()
        for field in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]
