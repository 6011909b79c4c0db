"""What a scheduled module costs, read from its text, and the FLOPs and kernels of a traced function."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from jax.interpreters import partial_eval

from dar_jax.models.flops import PEAK_FLOPS, peak_flops
from dar_jax.planning.gpus import Gpu


class Chip(NamedTuple):
    """Published figures of one chip. The clock is peak_flops / (2 * multipliers): they agree with each other."""

    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    peak_flops: float  # bfloat16, per second
    clock: float  # Hz
    ici_bandwidth: float  # bytes/s that a chip receives from its neighbours, over all links
    axes: int  # dimensions of a topology's name
    mode: str = "default"  # megacore: the two cores of a chip are one device


CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, PEAK_FLOPS["TPU v4"], 1.05e9, 300e9, 3, "megacore"),
    "v5e": Chip(16 * 2**30, 819e9, PEAK_FLOPS["TPU v5e"], 1.5e9, 200e9, 2),
    "v5p": Chip(95 * 2**30, 2765e9, PEAK_FLOPS["TPU v5"], 1.75e9, 600e9, 3, "megacore"),
    "v6e": Chip(32 * 2**30, 1640e9, PEAK_FLOPS["TPU v6e"], 1.75e9, 448e9, 2),
}
RESERVED_HBM = 2**28  # the compiler gives a program 15.75 of v5e's 16 GiB; taken for the other chips as well

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass
class Schedule:
    """What one run of a scheduled module costs on one chip.

    Attributes:
      seconds: without kernels. On TPUs the compiler's estimate. On GPUs a roofline: of matmuls the larger of FLOPs /
        peak and bytes / bandwidth, of all other fusions the compiler's estimate, of launching them nothing.
      kernel_seconds: of Pallas kernels on TPUs, each the larger of bytes / bandwidth and FLOPs / peak. A module for
        GPUs does not know what they declare: `count_kernel_seconds` does.
      kernel_calls: how many run; undeclared_kernels of them, on TPUs, declare no cost and count as their operands'
        bytes.
      collectives: kind -> {"count", "bytes"}, bytes those of the results.
      unknown_loops: loops whose trip count is not in the module; they count as one iteration.
    """

    seconds: float = 0.0
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


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _dimensions(shape: str) -> list[int]:
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def read_schedule(text: str, chip: Chip | Gpu) -> Schedule:
    """Sums a scheduled module (`compiled.as_text()`) over its call tree."""
    computations, entry = _parse(text)
    total = Schedule()

    def integers(name: str) -> dict[str, int]:
        """Values of the integer constants of a computation."""
        found = {i.name: re.match(r"\d+", i.rest) for i in computations[name] if re.match(r"[su]32\[\]", i.shape)}
        return {i.name: int(found[i.name][0]) for i in computations[name] if i.op == "constant" and found.get(i.name)}

    def trip_count(loop: _Instruction) -> int | None:
        if known := re.search(r'"?known_trip_count"?:\{"n":"?(\d+)', loop.rest):
            return int(known[1])
        # A loop counts up from zero to the only integer that its condition knows.
        condition, body = _called("condition", loop.rest), _called("body", loop.rest)
        if len(ends := integers(condition)) != 1:
            return None
        # By one, unless XLA made it to compute with the parts of a matrix while others come in.
        (index,) = {re.search(r"index=(\d+)", i.rest)[1] for i in computations[condition] if "index=" in i.rest}
        position = int(index)
        following = re.findall(r"%([\w.\-]+)", computations[body][-1].rest.split(")")[0])
        added = [i.rest for i in computations[body] if i.op == "add" and i.name in following[position : position + 1]]
        steps = [value for name, value in integers(body).items() if added and f"%{name})" in added[0]]
        return -(-ends.popitem()[1] // (steps[0] if steps else 1))

    def own_seconds(i: _Instruction, shapes: dict[str, str]) -> float | None:
        """Of an instruction with what it calls; None: that of what it calls."""
        if isinstance(chip, Chip):
            cycles = re.search(r'"estimated_cycles":"?(\d+)', i.rest)
            return int(cycles[1]) / chip.clock if cycles else None
        is_cublas, result, flops = 'custom_call_target="__cublas' in i.rest, i.shape, 0.0
        if i.op == "fusion":
            flops = dots(_called("calls", i.rest))
        elif is_cublas:  # as in a step that was tuned on a GPU; the rest of the result is room to work in
            result = re.search(r"\w+\[[\d,]*\]", i.shape)[0]
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)[1]
            flops = product_flops(result, shapes[_operands(i)[0]], re.findall(r"\d+", contracted))
        if flops:
            size = sum(_shape_bytes(shapes.get(operand, "")) for operand in _operands(i)) + _shape_bytes(result)
            return max(flops / peak_flops(chip.name), size / chip.bandwidth)
        # Several models of the compiler give a time, and the last is that of what limits the fusion.
        times = re.findall(r'"exec_time_us":([\d.e+-]+)', i.rest)
        return float(times[-1]) / 1e6 if times else None

    def product_flops(result: str, lhs: str, contracted: list[str]) -> float:
        return 2.0 * math.prod(_dimensions(result)) * math.prod(_dimensions(lhs)[int(d)] for d in contracted)

    def dots(name: str) -> float:
        """FLOPs of the matmuls of a fusion."""
        shapes, flops = {i.name: i.shape for i in computations[name]}, 0.0
        for i in computations[name]:
            if i.op == "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
                flops += product_flops(i.shape, shapes[_operands(i)[0]], contracted.split(","))
            elif called := _called("calls", i.rest):
                flops += dots(called)
        return flops

    def kernel(call: _Instruction, shapes: dict[str, str], times: int) -> None:
        cost = {k: float(v) for k, v in re.findall(r'"(flops|bytes_accessed)":"?(\d+)', call.rest)}
        if not any(cost.values()):
            total.undeclared_kernels += times
            cost = {"bytes_accessed": sum(_shape_bytes(shapes.get(o, "")) for o in _operands(call))}
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
            seconds = own_seconds(i, shapes)
            if seconds is not None and timed:
                total.seconds += times * seconds
            if i.op == "while":
                trips = trip_count(i)
                total.unknown_loops += trips is None
                for part in ("condition", "body"):  # beside which a collective may run that began before the loop
                    visit(_called(part, i.rest), times * (1 if trips is None else trips), timed, set(channels))
            elif i.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else [
                    _called("true_computation", i.rest), _called("false_computation", i.rest)
                ]  # fmt: skip
                visit(max(names, key=weight), times, timed, set())
            elif i.op in ("fusion", "async-start"):
                visit(_called("calls", i.rest), times, timed and seconds is None, channels)
            elif i.op == "call":
                visit(_called("to_apply", i.rest), times, timed and seconds is None, set())
            elif i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.rest:
                kernel(i, shapes, times)
            elif i.op == "custom-call" and 'custom_call_target="__gpu$xla.gpu.triton"' in i.rest:
                total.kernel_calls += times
            elif i.op.removesuffix("-done") in _COLLECTIVES:
                collective(i, name, times, channels)

    def weight(name: str) -> float:
        """Seconds of a branch, to find the costliest of a conditional: an upper bound."""
        nonlocal total
        saved, total = total, Schedule()
        visit(name, 1, True, set())
        seconds, total = total.seconds + total.kernel_seconds, saved
        return seconds

    visit(entry, 1, True, set())
    return total


def count_flops(jaxpr, platform: str = "tpu") -> float:
    """FLOPs of the matmuls and convolutions of a traced function, over all devices; scans times their length.

    Counted before XLA, whose own count takes a loop body once. A kernel counts as declared, a branch as its
    costliest, a loop of unknown length once. Of what a platform chooses, the branch of `platform` counts. What nothing
    uses is not counted, as XLA does not compute it: gradients of frozen weights, say.
    """

    def own(eqn) -> float | None:
        kind, params = eqn.primitive.name, eqn.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)
        if kind == "conv_general_dilated":
            kernel, out_features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_features]
        if kind == "pallas_call" and params["cost_estimate"] is not None:
            return params["cost_estimate"].flops
        return None

    return _add_up(jaxpr, platform, own)


def count_kernel_seconds(jaxpr, platform: str, flops: float, bandwidth: float) -> float:
    """What the kernels of a traced function take on one device after the other, counted as FLOPs are.

    Of each, the larger of the FLOPs that it declares over `flops`, per second, and the bytes over `bandwidth`.
    """

    def own(eqn) -> float | None:
        if eqn.primitive.name != "pallas_call" or (cost := eqn.params["cost_estimate"]) is None:
            return None
        return max(cost.flops / flops, cost.bytes_accessed / bandwidth)

    return _add_up(jaxpr, platform, own)


def _add_up(jaxpr, platform: str, own: Callable) -> float:
    """The sum of `own` over all equations; where it is None, over what they call."""
    return _add_up_used(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0], platform, own)


def _add_up_used(jaxpr, platform: str, own: Callable) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, params = eqn.primitive.name, eqn.params
        if (value := own(eqn)) is not None:
            total += value
            continue
        inner = [_add_up_used(j, platform, own) for j in _jaxprs(params)]
        if kind == "scan":
            total += params["length"] * sum(inner)
        elif kind == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * sum(inner)
        elif kind == "shard_map":
            total += math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"]) * sum(inner)
        else:
            if chosen := params.get("branches_platforms"):  # None stands for all other platforms
                inner = [next(f for f, of in zip(inner, chosen, strict=True) if of is None or platform in of)]
            total += max(inner, default=0.0) if kind == "cond" else sum(inner)
    return total


def _jaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)  # of a ClosedJaxpr
            if hasattr(item, "eqns"):
                yield item
