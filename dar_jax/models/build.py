"""From `config.model` to the module that it describes."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from dar_jax.conditions import EMPTY
from dar_jax.config import RIVALS
from dar_jax.models.mmdit import MMDiT
from dar_jax.models.rivals import Rival
from dar_jax.models.sit import SiT
from dar_jax.routing import QUERIES, Layout

# A model is a linen module: `model(x_t, t, condition) -> Output`. Its fields are those of `config.model` that it needs,
# but for the routing, which comes as `layout`, `query`, `streams`, `implementation` and `rival`.
MODELS = {"sit": SiT, "mmdit": MMDiT}

# How sublayers read what others wrote: over the residual stream, as a layout says, or as one of the rivals does.
ROUTINGS = ("residual", "dar", *RIVALS)
ROUTED = ("dar", "delta")  # as a layout says


def build(model: ConfigDict, *, plain: bool = False) -> SiT | MMDiT:
    """Returns the module that `config.model` describes (fields in dar_jax/config.py).

    Fields that the module does not have are ignored. A `plain` model has the same parameters and computes the same with
    plain autodiff (plain_stack.py).
    """
    routing = model.routing
    is_routed, structure = routing.kind in ROUTED, (routing.chunk_size, routing.summary, routing.final)
    layout = Layout(model.depth, *structure, routing.kind == "delta") if is_routed else None
    fields = {
        **model,
        "dtype": jnp.dtype(model.dtype),
        "layout": layout,
        "rival": None if is_routed or routing.kind == "residual" else Rival(routing.kind, routing.lanes),
        "query": QUERIES[routing.query],
        "streams": routing.streams,
        "num_words": EMPTY + 1 + len(model.words),
        "implementation": routing.implementation,
        "plain": plain,
    }
    family = MODELS[model.family]
    return family(**{field.name: fields[field.name] for field in dataclasses.fields(family) if field.name in fields})
