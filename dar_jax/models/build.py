"""From `config.model` to the module that it describes."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from dar_jax.conditions import EMPTY
from dar_jax.models.mmdit import MMDiT
from dar_jax.models.sit import SiT
from dar_jax.routing import QUERIES, Layout

# A model is a linen module: `model(x_t, t, condition) -> Output`. Its fields are those of `config.model` that it needs,
# but for the routing, which comes as `layout`, `query`, `streams` and `implementation`.
MODELS = {"sit": SiT, "mmdit": MMDiT}

# How sublayers read what others wrote: over the residual stream, or as a layout says.
ROUTINGS = {
    "residual": lambda depth, routing: None,
    "dar": lambda depth, routing: Layout(depth, routing.chunk_size, routing.summary, routing.final),
}


def build(model: ConfigDict, *, plain: bool = False) -> SiT | MMDiT:
    """Returns the module that `config.model` describes (fields in dar_jax/config.py).

    Fields that the module does not have are ignored. A `plain` model has the same parameters and computes the same with
    plain autodiff (plain_stack.py).
    """
    routing = model.routing
    fields = {
        **model,
        "dtype": jnp.dtype(model.dtype),
        "layout": ROUTINGS[routing.kind](model.depth, routing),
        "query": QUERIES[routing.query],
        "streams": routing.streams,
        "num_words": EMPTY + 1 + len(model.words),
        "implementation": routing.implementation,
        "plain": plain,
    }
    family = MODELS[model.family]
    return family(**{field.name: fields[field.name] for field in dataclasses.fields(family) if field.name in fields})
