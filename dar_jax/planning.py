"""What a train step needs on hardware that is not here: compiled ahead of time, read from the compiler's own report.

libtpu compiles for a TPU topology on any x86-64 machine. Memory is the compiler's assignment. Time is its estimate,
never a timing: the scheduled module names `estimated_cycles` for every operation, which are summed over the call
tree, loop bodies times their trip count. Two things carry no estimate: Pallas kernels, which count as their declared
cost, and traffic between chips, which is counted in bytes and taken to be hidden.
"""

import dataclasses
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from dar_jax import models, sharding
from dar_jax.config import validate
from dar_jax.diffusion import sampler
from dar_jax.errors import UserError
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import make_state
from dar_jax.training.step import make_train_step


class Chip(NamedTuple):
    """Published figures of one chip. The clock is peak_flops / (2 * multipliers): they agree with each other."""

    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    peak_flops: float  # bfloat16, per second
    clock: float  # Hz
    axes: int  # dimensions of a topology's name
    mode: str = "default"  # megacore: the two cores of a chip are one device


CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 275e12, 1.05e9, 3, "megacore"),
    "v5e": Chip(16 * 2**30, 819e9, 197e12, 1.5e9, 2),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 1.75e9, 3, "megacore"),
    "v6e": Chip(32 * 2**30, 1640e9, 918e12, 1.75e9, 2),
}
RESERVED_HBM = 2**28  # the compiler gives a program 15.75 of v5e's 16 GiB; taken for the other chips as well

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass
class Schedule:
    """What one run of a scheduled module costs on one chip.

    Attributes:
      cycles: the compiler's estimate, without kernels.
      kernel_seconds: of Pallas kernels, each the larger of bytes / bandwidth and FLOPs / peak.
      kernel_calls: how many run; undeclared_kernels of them declare no cost and count as their operands' bytes.
      collectives: kind -> {"count", "bytes"}, bytes those of the results.
      unknown_loops: loops whose trip count is not in the module; they count as one iteration.
    """

    cycles: float = 0.0
    kernel_seconds: float = 0.0
    kernel_calls: int = 0
    undeclared_kernels: int = 0
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computations of an HLO module in text form by name, and the name of its entry."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)", line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _called(attribute: str, text: str) -> str | None:
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", text)
    return match[1] if match else None


def _shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple in HLO's notation, unpadded: bf16[8,256]{1,0} -> 4096."""
    total = 0
    for kind, bits, size in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        count = math.prod(int(n) for n in size.split(",") if n)
        total += count * max(1, (8 if kind == "pred" else int(bits)) // 8)
    return total


def read_schedule(text: str, chip: Chip) -> Schedule:
    """Sums a scheduled module (`compiled.as_text()`) over its call tree."""
    computations, entry = _parse(text)
    total = Schedule()

    def trip_count(loop: _Instruction) -> int | None:
        if known := re.search(r'"?known_trip_count"?:\{"n":"?(\d+)', loop.rest):
            return int(known[1])
        # A scan counts up from zero: the only integer its condition knows is the length.
        condition = computations[_called("condition", loop.rest)]
        found = [re.match(r"\d+", i.rest) for i in condition if i.op == "constant" and i.shape.startswith("s32[]")]
        return int(found[0][0]) if len(found) == 1 and found[0] else None

    def kernel(call: _Instruction, shapes: dict[str, str], times: int) -> None:
        cost = {k: float(v) for k, v in re.findall(r'"(flops|bytes_accessed)":"?(\d+)', call.rest)}
        if not any(cost.values()):
            total.undeclared_kernels += times
            operands = re.findall(r"%([\w.\-]+)", call.rest.split(")")[0])
            cost = {"bytes_accessed": sum(_shape_bytes(shapes.get(o, "")) for o in operands)}
            cost["bytes_accessed"] += _shape_bytes(call.shape)
        seconds = max(cost.get("flops", 0) / chip.peak_flops, cost.get("bytes_accessed", 0) / chip.hbm_bandwidth)
        total.kernel_calls += times
        total.kernel_seconds += times * seconds

    def collective(op: _Instruction, computation: str, times: int, channels: set[str]) -> None:
        # The text repeats an asynchronous collective in every fusion it runs beside, under the same channel.
        channel = re.search(r"channel_id=(\d+)", op.rest)
        if channel and channel[1] in channels:
            return
        channels.update(channel.groups() if channel else ())
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else op.op.removesuffix("-done")
        entry = total.collectives.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * _shape_bytes(op.shape)

    def visit(name: str, times: int, timed: bool, channels: set[str]) -> None:
        instructions = computations[name]
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            cycles = re.search(r'"estimated_cycles":"?(\d+)', i.rest)
            if cycles and timed:
                total.cycles += times * int(cycles[1])
            if i.op == "while":
                trips = trip_count(i)
                total.unknown_loops += trips is None
                for part in ("condition", "body"):
                    visit(_called(part, i.rest), times * (1 if trips is None else trips), timed, set())
            elif i.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else [
                    _called("true_computation", i.rest), _called("false_computation", i.rest)
                ]  # fmt: skip
                visit(max(names, key=weight), times, timed, set())
            elif i.op in ("fusion", "async-start"):
                visit(_called("calls", i.rest), times, timed and not cycles, channels)
            elif i.op == "call":
                visit(_called("to_apply", i.rest), times, timed and not cycles, set())
            elif i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.rest:
                kernel(i, shapes, times)
            elif i.op.removesuffix("-done") in _COLLECTIVES:
                collective(i, name, times, channels)

    def weight(name: str) -> float:
        """Seconds of a branch, to find the costliest of a conditional: an upper bound."""
        nonlocal total
        saved, total = total, Schedule()
        visit(name, 1, True, set())
        seconds, total = total.cycles / chip.clock + total.kernel_seconds, saved
        return seconds

    visit(entry, 1, True, set())
    return total


def count_flops(jaxpr) -> float:
    """FLOPs of the matmuls and convolutions of a traced function, over all devices; scans times their length.

    Counted before XLA, whose own count takes a loop body once. A kernel counts as declared, a branch as its
    costliest, a loop of unknown length once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, params = eqn.primitive.name, eqn.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)
        elif kind == "conv_general_dilated":
            kernel, out_features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_features]
        elif kind == "pallas_call" and params["cost_estimate"] is not None:
            total += params["cost_estimate"].flops
        else:
            inner = [count_flops(j) for j in _jaxprs(params)]
            if kind == "scan":
                total += params["length"] * sum(inner)
            elif kind == "pallas_call":
                total += math.prod(params["grid_mapping"].grid) * sum(inner)
            elif kind == "shard_map":
                total += math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"]) * sum(inner)
            else:
                total += max(inner, default=0.0) if kind == "cond" else sum(inner)
    return total


def _jaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)  # of a ClosedJaxpr
            if hasattr(item, "eqns"):
                yield item


@dataclasses.dataclass(frozen=True)
class Plan:
    """One train step on one topology; None is "not known" (host devices have no estimate, nor has what does not fit).

    Attributes:
      devices: chips of the topology.
      batch_size: images per step over all devices.
      hbm_argument_bytes: per chip: parameters, EMA, optimizer state, batch.
      hbm_temp_bytes: per chip: activations, gradients and everything else a step needs meanwhile.
      hbm_total_bytes: both, and outputs and program where they take room of their own.
      hbm_capacity_bytes: per chip; of host devices, their share of this machine's memory.
      fits: whether the compiler accepts it; on host devices, whether total is at most capacity.
      flops_per_step: matmul FLOPs that are executed, over all devices, recomputation included.
      model_flops_per_step: three times those of the forward pass: what MFU counts.
      estimated_step_ms: the compiler's estimate, kernels included, time between chips not.
      estimated_kernel_ms: the part of Pallas kernels, by declared cost.
      mfu: model_flops_per_step over what the chips could do in estimated_step_ms.
      kernel_calls, undeclared_kernels, unknown_loops, collectives: of `Schedule`, per chip and step.
      compile_seconds: on this machine, without tracing.
      suggested_batch_size: the largest that should fit, extrapolated; None if not even one image per chip does.
    """

    topology: str
    devices: int
    batch_size: int
    hbm_argument_bytes: int
    hbm_temp_bytes: int
    hbm_total_bytes: int
    hbm_capacity_bytes: int
    fits: bool
    flops_per_step: float
    model_flops_per_step: float
    estimated_step_ms: float | None
    estimated_kernel_ms: float | None
    mfu: float | None
    kernel_calls: int | None
    undeclared_kernels: int | None
    unknown_loops: int | None
    collectives: dict[str, dict[str, int]] | None
    compile_seconds: float
    suggested_batch_size: int | None


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """ "v5e:4x4" -> ("v5e", (4, 4)), "cpu:8" -> ("cpu", (8,)). Raises UserError for anything else."""
    kind, _, size = topology.partition(":")
    axes = CHIPS[kind].axes if kind in CHIPS else 1
    if kind not in ("cpu", *CHIPS) or not re.fullmatch("x".join([r"[1-9]\d*"] * axes), size):
        raise UserError(
            f'--topology = "{topology}" is not understood; valid forms, in any size the hardware has, are '
            "v5e:4x4, v6e:4x4, v4:4x4x4, v5p:2x4x4 and cpu:8."
        )
    return kind, tuple(int(n) for n in size.split("x"))


def _devices(topology: str):
    kind, size = parse_topology(topology)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < size[0]:
            raise UserError(
                f'--topology = "{topology}" needs {size[0]} host devices, but jax started with {len(devices)}.'
            )
        return devices[: size[0]]
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(f'--topology = "{topology}" needs the TPU compiler: pip install -e ".[plan]"') from error
    try:
        mode = CHIPS[kind].mode
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, chip_config_name=mode).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology = "{topology}" is refused by libtpu: {str(error).splitlines()[0]}') from error


def make_plan(config: ConfigDict, topology: str) -> Plan:
    """Compiles the train step of `config` for `topology`, "v5e:4x4" or "cpu:8".

    Raises UserError for a config that could not be trained there, an unknown topology, or a missing libtpu.
    """
    validate(config)
    sampler.check(config.sampler)
    devices = _devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_model(mesh, config.model)
    num_micro = config.train.accumulate_steps
    sharding.check_batch(mesh, "config.train.batch_size / accumulate_steps", config.train.batch_size // num_micro)

    model = models.build(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    with sharding.use(mesh):
        _, state = make_state(config, model, optimizer, mesh)
        batch = _abstract_batch(config, sharding.batch_sharding(mesh))
        traced = jax.jit(make_train_step(config, model, optimizer), donate_argnums=0).trace(state, batch)
        t, image = jax.ShapeDtypeStruct(batch["label"].shape, jnp.float32), batch["image"]
        forward = jax.make_jaxpr(lambda p, x, t, y: model.apply({"params": p}, x, t, y))
        model_flops = 3 * count_flops(forward(state.params, image, t, batch["label"]).jaxpr)
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
        arguments, total = _bytes_per_device((state, batch)), int(float(refused[1]) * 2**30)
        temporaries = total - arguments
    else:
        memory = compiled.memory_analysis()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = arguments + temporaries + outputs + memory.generated_code_size_in_bytes

    chip = CHIPS.get(parse_topology(topology)[0])
    capacity = chip.hbm_bytes if chip else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    usable = capacity - RESERVED_HBM if chip else capacity
    schedule = read_schedule(compiled.as_text(), chip or CHIPS["v5e"]) if compiled else None
    kernel_seconds = schedule.kernel_seconds if chip and compiled else None
    seconds = schedule.cycles / chip.clock + kernel_seconds if chip and compiled else None
    gradient = _bytes_per_device(state.params)
    return Plan(
        topology=topology,
        devices=len(devices),
        batch_size=config.train.batch_size,
        hbm_argument_bytes=arguments,
        hbm_temp_bytes=temporaries,
        hbm_total_bytes=total,
        hbm_capacity_bytes=capacity,
        fits=compiled is not None and total <= capacity,
        flops_per_step=count_flops(traced.jaxpr.jaxpr),
        model_flops_per_step=model_flops,
        estimated_step_ms=seconds and 1e3 * seconds,
        estimated_kernel_ms=None if kernel_seconds is None else 1e3 * kernel_seconds,
        mfu=seconds and model_flops / (len(devices) * seconds * chip.peak_flops),
        kernel_calls=schedule and schedule.kernel_calls,
        undeclared_kernels=schedule and schedule.undeclared_kernels,
        unknown_loops=schedule and schedule.unknown_loops,
        collectives=schedule and schedule.collectives,
        compile_seconds=compile_seconds,
        suggested_batch_size=suggest_batch_size(
            config.train.batch_size, len(devices) * num_micro, usable - (total - temporaries), temporaries, gradient
        ),
    )


def suggest_batch_size(batch_size: int, unit: int, available: int, temporaries: int, gradient: int) -> int | None:
    """The largest batch whose temporaries should fit, None if there is none.

    Extrapolates from one compile: one gradient stays, all else of the temporaries grows with the batch.

    Args:
      batch_size: what was compiled.
      unit: devices * accumulate_steps; a batch is a multiple of it.
      available, temporaries, gradient: bytes per chip: for temporaries, at `batch_size`, of one gradient.
    """
    fixed = gradient if temporaries > gradient else 0
    count = math.floor((available - fixed) / (temporaries - fixed) * (batch_size // unit))
    if count < 1:
        return None
    return unit * (count - count % 8 if count > 8 else count)


def _abstract_batch(config: ConfigDict, batch_sharding) -> dict:
    size, side = config.train.batch_size, config.model.input_size
    image = jax.ShapeDtypeStruct((size, side, side, config.model.channels), jnp.float32, sharding=batch_sharding)
    return {"image": image, "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch_sharding)}


def _bytes_per_device(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report(plan: Plan) -> str:
    """The plan as a table for people."""
    per_chip = plan.batch_size / plan.devices
    rows = [
        ("topology", f"{plan.topology}, {plan.devices} devices"),
        ("batch", f"{plan.batch_size} images, {per_chip:g} per device"),
        ("memory per device", f"{_gib(plan.hbm_total_bytes)} of {_gib(plan.hbm_capacity_bytes)}"),
        ("  arguments", f"{_gib(plan.hbm_argument_bytes)}  parameters, EMA, optimizer state, batch"),
        ("  temporaries", f"{_gib(plan.hbm_temp_bytes)}  activations, gradients"),
        ("fits", "yes" if plan.fits else "no"),
        (
            "FLOPs per step",
            f"{plan.flops_per_step:.4g} executed, {plan.model_flops_per_step:.4g} of the model (3x forward)",
        ),
    ]
    if plan.estimated_step_ms is not None:
        rest = plan.estimated_step_ms - plan.estimated_kernel_ms
        kernels = f"{plan.kernel_calls} Pallas calls" + (
            f", {plan.undeclared_kernels} without a declared cost" if plan.undeclared_kernels else ""
        )
        rows += [
            (
                "estimated step time",
                f"{plan.estimated_step_ms:.2f} ms  not a timing; traffic between chips not included",
            ),
            ("  XLA", f"{rest:.2f} ms  the compiler's cycles"),
            ("  kernels", f"{plan.estimated_kernel_ms:.2f} ms  {kernels}"),
            ("estimated MFU", f"{100 * plan.mfu:.1f}%"),
        ]
    for kind, entry in sorted((plan.collectives or {}).items()):
        rows.append((kind, f"{entry['count']} per step, {entry['bytes'] / 2**20:.1f} MiB per device"))
    if plan.unknown_loops:
        rows.append(("beware", f"{plan.unknown_loops} loops of unknown length are counted as one iteration"))
    suggestion = plan.suggested_batch_size or "none fits; raise config.mesh.fsdp, or take more or larger chips"
    rows += [
        ("compile time", f"{plan.compile_seconds:.1f} s"),
        (
            "suggested batch",
            f"{suggestion}  (extrapolated from this compile)" if plan.suggested_batch_size else suggestion,
        ),
    ]
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"
