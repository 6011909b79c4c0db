"""Plans as text for people, and several of them as a table and a picture."""

from dar_jax import files
from dar_jax.planning.plan import Plan


def report(plan: Plan) -> str:
    """The plan as a table for people."""
    per_chip = plan.batch_size / plan.devices
    rows = [
        ("topology", f"{plan.topology}, {plan.devices} devices"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())),
        ("batch", f"{plan.batch_size} images, {per_chip:g} per device, in {plan.accumulate_steps} microbatches"),
        ("memory per device", f"{_gib(plan.hbm_total_bytes)} of {_gib(plan.hbm_capacity_bytes)}"),
        ("  arguments", f"{_gib(plan.hbm_argument_bytes)}  parameters, EMA, optimizer state, batch"),
        ("  temporaries", f"{_gib(plan.hbm_temp_bytes)}  activations, gradients"),
        ("  by kind", ", ".join(f"{kind} {size / 2**30:.3f}" for kind, size in plan.memory_bytes.items())),
        ("fits", "yes" if plan.fits else "no"),
        (
            "FLOPs per step",
            f"{plan.flops_per_step:.4g} executed, {plan.model_flops_per_step:.4g} of the model",
        ),
    ]
    if plan.estimated_step_ms is not None:
        is_gpu = plan.traffic_ms is None
        source = "roofline" if is_gpu else "the compiler's cycles"
        traffic = "not estimated" if is_gpu else f"{plan.traffic_ms:.2f} ms at full bandwidth, partly hidden"
        rest = plan.estimated_step_ms - plan.estimated_kernel_ms
        kernels = f"{plan.kernel_calls} Pallas calls" + (
            f", {plan.undeclared_kernels} without a declared cost" if plan.undeclared_kernels else ""
        )
        rows += [
            ("estimated step time", f"{plan.estimated_step_ms:.2f} ms  not a timing"),
            ("  XLA", f"{rest:.2f} ms  {source}"),
            ("  kernels", f"{plan.estimated_kernel_ms:.2f} ms  {kernels}"),
            ("traffic between chips", traffic),
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


def table(plans: list[Plan]) -> str:
    """Several plans, one line each; GiB per chip, milliseconds per step."""
    heads = (
        "topology",
        "mesh",
        "micro",
        *(kind for kind in plans[0].memory_bytes),
        "total",
        "of",
        "ms",
        "traffic",
        "MFU",
    )
    lines = [heads]
    for plan in plans:
        mesh = "x".join(str(size) for size in plan.mesh.values())
        kinds = (f"{size / 2**30:.2f}" for size in plan.memory_bytes.values())
        total = f"{plan.hbm_total_bytes / 2**30:.2f}" + ("" if plan.fits else " no")
        known = plan.estimated_step_ms is not None
        traffic = "-" if plan.traffic_ms is None else f"{plan.traffic_ms:.1f}"
        times = (f"{plan.estimated_step_ms:.0f}", traffic, f"{plan.mfu:.0%}") if known else ("-",) * 3
        capacity = f"{plan.hbm_capacity_bytes / 2**30:.0f}"
        lines.append((plan.topology, mesh, str(plan.accumulate_steps), *kinds, total, capacity, *times))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def plot(groups: dict[str, list[Plan]], path: str) -> None:
    """Estimated images per second over chips, and memory per chip, of named groups of plans, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, plans), marker in zip(groups.items(), "osv^Dx", strict=False):
        if timed := [plan for plan in plans if plan.estimated_step_ms]:
            rate = [1e3 * plan.batch_size / plan.estimated_step_ms for plan in timed]
            speed.plot([plan.devices for plan in timed], rate, marker=marker, label=name)
            speed.set_yscale("log")
        total = [plan.hbm_total_bytes / 2**30 for plan in plans]
        memory.plot([plan.devices for plan in plans], total, marker=marker, label=name)
    speed.set(xscale="log", xlabel="chips", ylabel="images/s (estimate, not a timing)")
    memory.set(xscale="log", xlabel="chips", ylabel="GiB per chip", ylim=(0, None))
    chips = sorted({plan.devices for plans in groups.values() for plan in plans})
    for axes in (speed, memory):
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    if len(groups) > 1:
        memory.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
