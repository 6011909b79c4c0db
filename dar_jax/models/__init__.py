"""Models: flax.linen modules, arrays in, arrays out."""

from dar_jax.models.build import build
from dar_jax.models.sit import Output, SiT

__all__ = ["Output", "SiT", "build"]
