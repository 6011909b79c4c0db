"""One train step compiled for a topology: memory, FLOPs, traffic and the compiler's estimate of its time."""

import dataclasses
import math
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from dar_jax import models, sharding
from dar_jax.config import micro_batch
from dar_jax.data.feed import abstract_batch
from dar_jax.errors import UserError
from dar_jax.models.flops import forward_flops, peak_flops
from dar_jax.planning import gpus
from dar_jax.planning.schedule import CHIPS, RESERVED_HBM, count_flops, count_kernel_seconds, read_schedule
from dar_jax.training.setup import build_algorithm, set_up

MAX_CHIPS = 65_536  # nobody has more
MAX_HOST_DEVICES = 512  # more take minutes to start


@dataclasses.dataclass(frozen=True)
class Plan:
    """One train step on one topology; None is "not known": no time of host devices, nor of what does not fit.

    Attributes:
      devices: chips of the topology.
      mesh: devices along data, fsdp and tensor.
      batch_size: images per step over all devices.
      accumulate_steps: microbatches of a step.
      hbm_argument_bytes: per chip: parameters, EMA, optimizer state, batch.
      hbm_temp_bytes: per chip: activations, gradients and everything else a step needs meanwhile.
      hbm_total_bytes: both, and outputs and program where they take room of their own.
      hbm_capacity_bytes: per chip; of GPUs, what jax takes; of host devices, their share of this machine's memory.
      memory_bytes: the same by kind, per chip: "params", "ema", "optimizer" (all else of the state), "frozen" (networks
        that a step uses and does not change, if there are any), "batch", "history" (the sources of routing and their
        cotangents) and "activations", which is all else: also gradients and the program.
      fits: whether the compiler accepts it; on GPUs and host devices, whether total is at most capacity.
      flops_per_step: matmul FLOPs that are executed, over all devices, recomputation included.
      model_flops_per_step: what MFU counts: those of the forward pass, times three or what the algorithm takes.
      estimated_step_ms: the compiler's estimate, kernels included, time between chips not; on GPUs a roofline, which is
        a lower bound (`Schedule.seconds`).
      estimated_kernel_ms: the part of Pallas kernels, by declared cost.
      traffic_ms: what the bytes of the collectives take at the full bandwidth of a chip's links to its neighbours, a
        lower bound, of which the compiler hides what it can behind the step; None on GPUs.
      mfu: model_flops_per_step over what the chips could do in estimated_step_ms.
      kernel_calls, undeclared_kernels, unknown_loops, collectives: of `Schedule`, per chip and step.
      compile_seconds: on this machine, without tracing.
      suggested_batch_size: the largest that should fit, extrapolated; None if not even one image per chip does.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    accumulate_steps: int
    hbm_argument_bytes: int
    hbm_temp_bytes: int
    hbm_total_bytes: int
    hbm_capacity_bytes: int
    memory_bytes: dict[str, int]
    fits: bool
    flops_per_step: float
    model_flops_per_step: float
    estimated_step_ms: float | None
    estimated_kernel_ms: float | None
    traffic_ms: float | None
    mfu: float | None
    kernel_calls: int | None
    undeclared_kernels: int | None
    unknown_loops: int | None
    collectives: dict[str, dict[str, int]] | None
    compile_seconds: float
    suggested_batch_size: int | None


def parse_topology(topology: str) -> tuple[str, tuple[int, ...], int]:
    """Kind, size and number of slices or hosts.

    "v5e:4x4" -> ("v5e", (4, 4), 1), "v5e:4x4*2" (slices) -> ("v5e", (4, 4), 2), "h100:8*4" (hosts) -> ("h100", (8,),
    4), "cpu:8" -> ("cpu", (8,), 1).

    Raises UserError for anything else, and for more devices than anybody has.
    """
    kind, _, size = topology.partition(":")
    size, _, slices = size.partition("*") if kind != "cpu" else (size, "", "")
    axes = CHIPS[kind].axes if kind in CHIPS else 1
    kinds = ("cpu", *CHIPS, *gpus.GPUS)
    form = "x".join([r"[1-9]\d*"] * axes)
    if kind not in kinds or not re.fullmatch(form, size) or not re.fullmatch(r"([1-9]\d*)?", slices):
        raise UserError(
            f'--topology = "{topology}" is not understood; valid forms, in any size the hardware has, are '
            "v5e:4x4, v6e:4x4, v4:4x4x4, v5p:2x4x4, v5e:16x16*2 (slices), h100:8, h200:8, a100:8, h100:8*4 (hosts) "
            "and cpu:8."
        )
    shape, slices = tuple(int(n) for n in size.split("x")), int(slices or 1)
    if math.prod(shape) * slices > (MAX_HOST_DEVICES if kind == "cpu" else MAX_CHIPS):
        raise UserError(
            f'--topology = "{topology}" is too large; at most {MAX_CHIPS} chips or {MAX_HOST_DEVICES} host devices can '
            "be planned for."
        )
    return kind, shape, slices


def _devices(topology: str):
    kind, size, slices = parse_topology(topology)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < size[0]:
            raise UserError(
                f'--topology = "{topology}" needs {size[0]} host devices, but jax started with {len(devices)}.'
            )
        return devices[: size[0]]
    if kind in gpus.GPUS:
        return gpus.devices(kind, size[0], slices)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(f'--topology = "{topology}" needs the TPU compiler: pip install -e ".[plan]"') from error
    try:
        mode = CHIPS[kind].mode
        options = {"chip_config_name": mode, **({"num_slices": slices} if slices > 1 else {})}
        return topologies.get_topology_desc(topology.partition("*")[0], platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology = "{topology}" is refused by libtpu: {str(error).splitlines()[0]}') from error


def make_plan(config: ConfigDict, topology: str) -> Plan:
    """Compiles the train step of `config` for `topology`, "v5e:4x4", "h100:8" or "cpu:8".

    `config` has passed `validate`. Raises UserError for a config that could not be trained there, an unknown topology,
    or a missing compiler.
    """
    devices = _devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_model(mesh, config.model)
    num_micro = config.train.accumulate_steps
    sharding.check_batch(mesh, "config.train.batch_size / accumulate_steps", micro_batch(config))

    with sharding.use(mesh):
        run = set_up(config, build_algorithm(config), mesh)
        batch = abstract_batch(config, mesh)
        traced = run.step.trace(run.state, run.frozen, batch)
        lowered = traced.lower()
        start = time.perf_counter()
        try:
            compiled, refused = lowered.compile(), None
        except jax.errors.JaxRuntimeError as error:
            compiled, refused = None, re.search(r"HLO temporaries \(([\d.]+)G\) exceeds", str(error))
            if not refused:
                raise
        compile_seconds = time.perf_counter() - start

    if compiled is None:  # the compiler's figure is the total, arguments included
        arguments, total = _bytes_per_device((run.state, run.frozen, batch)), int(float(refused[1]) * 2**30)
        temporaries = total - arguments
    else:
        memory = compiled.memory_analysis()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = arguments + temporaries + outputs + memory.generated_code_size_in_bytes

    kind = parse_topology(topology)[0]
    chip, gpu = CHIPS.get(kind), gpus.GPUS.get(kind)
    if chip:
        capacity, usable = chip.hbm_bytes, chip.hbm_bytes - RESERVED_HBM
    elif gpu:
        capacity = usable = int(gpus.USABLE * gpu.memory)
    else:
        capacity = usable = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    schedule = read_schedule(compiled.as_text(), chip or gpu or CHIPS["v5e"]) if compiled else None
    peak, platform = None, "tpu" if chip else "cuda" if gpu else "cpu"
    kernel_seconds = seconds = None
    if compiled and (chip or gpu):
        peak, kernel_seconds = chip.peak_flops if chip else peak_flops(gpu.name), schedule.kernel_seconds
        if gpu:
            declared = count_kernel_seconds(traced.jaxpr.jaxpr, platform, peak, gpu.bandwidth)
            kernel_seconds = declared / len(devices)
        seconds = schedule.seconds + kernel_seconds
    fields = {field.name: _bytes_per_device(getattr(run.state, field.name)) for field in dataclasses.fields(run.state)}
    params, ema = fields.pop("params"), fields.pop("ema")
    passes = run.algorithm.forward_passes
    model_flops = passes * config.train.batch_size * forward_flops(models.build(config.model))
    collectives = schedule.collectives if schedule else {}
    traffic = sum((2 if kind == "all-reduce" else 1) * entry["bytes"] for kind, entry in collectives.items())
    memory_bytes = {
        "params": params,
        "ema": ema,
        "optimizer": sum(fields.values()),
        **({"frozen": _bytes_per_device(run.frozen)} if run.frozen else {}),
        "batch": _bytes_per_device(batch),
        "history": _history_bytes(config, mesh),
    }
    memory_bytes["activations"] = max(0, total - sum(memory_bytes.values()))
    fixed, unit = total - temporaries, sharding.batch_shards(mesh) * num_micro
    return Plan(
        topology=topology,
        devices=len(devices),
        mesh=dict(mesh.shape),
        batch_size=config.train.batch_size,
        accumulate_steps=num_micro,
        hbm_argument_bytes=arguments,
        hbm_temp_bytes=temporaries,
        hbm_total_bytes=total,
        hbm_capacity_bytes=capacity,
        memory_bytes=memory_bytes,
        fits=compiled is not None and total <= capacity,
        flops_per_step=count_flops(traced.jaxpr.jaxpr, platform),
        model_flops_per_step=model_flops,
        estimated_step_ms=seconds and 1e3 * seconds,
        estimated_kernel_ms=None if kernel_seconds is None else 1e3 * kernel_seconds,
        traffic_ms=1e3 * traffic / chip.ici_bandwidth if chip and compiled else None,
        mfu=seconds and model_flops / (len(devices) * seconds * peak),
        kernel_calls=schedule and schedule.kernel_calls,
        undeclared_kernels=schedule and schedule.undeclared_kernels,
        unknown_loops=schedule and schedule.unknown_loops,
        collectives=schedule and schedule.collectives,
        compile_seconds=compile_seconds,
        suggested_batch_size=suggest_batch_size(config.train.batch_size, unit, usable - fixed, temporaries, params),
    )


def make_fitting_plan(config: ConfigDict, topology: str) -> Plan:
    """As `make_plan`; if the batch does not fit, in as few microbatches (a power of two) as should."""
    plan = make_plan(config, topology)
    while not plan.fits and plan.suggested_batch_size:
        parts = plan.mesh["data"] * plan.mesh["fsdp"]
        steps = 2 * plan.accumulate_steps
        while steps < plan.accumulate_steps * plan.batch_size / plan.suggested_batch_size:
            steps *= 2
        if plan.batch_size % (steps * parts):
            break
        config = config.copy_and_resolve_references()
        config.train.accumulate_steps = steps
        plan = make_plan(config, topology)
    return plan


def suggest_batch_size(batch_size: int, unit: int, available: int, temporaries: int, gradient: int) -> int | None:
    """The largest batch whose temporaries should fit, None if there is none.

    Extrapolates from one compile: one gradient stays, all else of the temporaries grows with the batch.

    Args:
      batch_size: what was compiled.
      unit: parts of a batch * accumulate_steps; a batch is a multiple of it.
      available, temporaries, gradient: bytes per chip: for temporaries, at `batch_size`, of one gradient.
    """
    fixed = gradient if temporaries > gradient else 0
    count = math.floor((available - fixed) / (temporaries - fixed) * (batch_size // unit))
    if count < 1:
        return None
    return unit * (count - count % 8 if count > 8 else count)


def _history_bytes(config: ConfigDict, mesh) -> int:
    """Of the sources that one microbatch's routing keeps, and of their cotangents; 0 for a residual model."""
    model, layout = config.model, models.build(config.model).layout
    if layout is None:
        return 0
    samples = micro_batch(config) // sharding.batch_shards(mesh)
    tokens = (model.input_size // model.patch_size) ** 2
    if model.family == "mmdit" and model.routing.streams == "both":
        tokens += model.text_length
    tokens //= mesh.shape["tensor"]
    return 2 * layout.num_rows * samples * tokens * model.hidden_size * jnp.dtype(model.dtype).itemsize


def _bytes_per_device(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
