"""From a config to its objective."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from dar_jax import models
from dar_jax.objectives import adapted, dmd, flow, repa
from dar_jax.objectives.objective import Objective


def build(
    config: ConfigDict, model: nn.Module | None = None, *, load_base: Callable[[Any], dict] | None = None
) -> Objective:
    """The objective of a config: `config.diffusion`, with the alignment of `config.repa` if it has a target.

    It is that of `model`, by default of the one that `config.model` describes, adapted if `config.lora` has a rank
    (`load_base` of `adapted.build`). Reads no file.
    """
    model = model or models.build(config.model)
    objective = flow.build(config, model, repa.build(config, model) if config.repa.target != "none" else None)
    if config.algorithm == "dmd":
        objective = objective._replace(sample=dmd.build_sample(config, model))
    return adapted.build(config, objective, load_base) if config.lora.rank else objective
