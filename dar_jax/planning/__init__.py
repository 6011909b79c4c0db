"""What a train step needs on hardware that is not here: compiled ahead of time, read from the compiler's own report.

libtpu compiles for a TPU topology on any x86-64 machine, and XLA for GPUs (gpus.py). Memory is the compiler's
assignment. Time is an estimate, never a timing. For TPUs it is the compiler's: the scheduled module names
`estimated_cycles` for every operation, which are summed over the call tree, loop bodies times their trip count. For
GPUs it is a roofline of matmuls, and the compiler's figure for all other fusions. Two things carry no estimate: Pallas
kernels, which count as their declared cost, and traffic between chips, which is counted in bytes and left out.
"""

from dar_jax.planning.plan import Plan, make_fitting_plan, make_plan, parse_topology, suggest_batch_size
from dar_jax.planning.report import plot, report, table
from dar_jax.planning.schedule import CHIPS, Chip, count_flops, count_kernel_seconds, read_schedule

__all__ = [
    "CHIPS", "Chip", "Plan", "count_flops", "count_kernel_seconds",
    "make_fitting_plan", "make_plan", "parse_topology", "plot", "read_schedule",
    "report", "suggest_batch_size", "table",
]  # fmt: skip
