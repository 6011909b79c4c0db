"""From a config to its objective."""

import flax.linen as nn
from ml_collections import ConfigDict

from dar_jax import models
from dar_jax.objectives import flow, repa
from dar_jax.objectives.objective import Objective


def build(config: ConfigDict, model: nn.Module | None = None) -> Objective:
    """The objective of a config: `config.diffusion`, with the alignment of `config.repa` if it has a target.

    It is that of `model`, by default of the one that `config.model` describes. Reads no file.
    """
    model = model or models.build(config.model)
    return flow.build(config, model, repa.build(config, model) if config.repa.target != "none" else None)
