"""Models: flax.linen modules, arrays in, arrays out."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from dar_jax.models.sit import SiT
from dar_jax.routing import Layout

__all__ = ["SiT", "build"]


def build(model: ConfigDict) -> SiT:
    """Returns the module that `config.model` describes (fields in dar_jax/config.py)."""
    fields = {k: v for k, v in model.items() if k not in ("routing", "dtype")}
    routing = model.routing
    routed = routing.kind == "dar"
    layout = Layout(model.depth, routing.chunk_size, routing.summary, routing.final) if routed else None
    return SiT(
        **fields,
        dtype=jnp.dtype(model.dtype),
        layout=layout,
        query=routing.query,
        implementation=routing.implementation,
    )
