"""Diffusion-Adaptive Routing for any transformer: sources, queries and the softmax over depth. Knows arrays only."""

from dar_jax.routing.aggregate import (
    IMPLEMENTATIONS,
    Execution,
    add_cotangents,
    add_source_cotangent,
    inverse_rms,
    read,
    state,
    sublayer_input,
)
from dar_jax.routing.kernels.xla import statistics_dtype
from dar_jax.routing.queries import QUERIES, Query
from dar_jax.routing.sources import FINALS, SUMMARIES, Layout
from dar_jax.routing.warm_start import keeps_function, uniform, warm_start, warm_start_streams

__all__ = [
    "FINALS",
    "IMPLEMENTATIONS",
    "QUERIES",
    "SUMMARIES",
    "Execution",
    "Layout",
    "Query",
    "add_cotangents",
    "add_source_cotangent",
    "inverse_rms",
    "keeps_function",
    "read",
    "state",
    "statistics_dtype",
    "sublayer_input",
    "uniform",
    "warm_start",
    "warm_start_streams",
]
