"""Any objective with its model adapted: low-rank adapters and routing are trained, all other weights are frozen."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from dar_jax.errors import UserError, check_choice, require
from dar_jax.models import lora
from dar_jax.objectives.objective import Objective

STREAM = 2**32 - 3  # of the key of `init`, for A


def build(config: ConfigDict, objective: Objective, load_base: Callable[[Any], dict] | None) -> Objective:
    """`objective` with `config.lora`: one of the same loss, of which less is trained.

    What is frozen is {"base": the frozen weights in `config.lora.dtype`, "others": what `objective` has frozen}.

    Args:
      config: of the run.
      objective: of all parameters of the model.
      load_base: the abstract base with shardings -> the base. None serves who plans, or brings a base of his own.
    """
    settings = config.lora

    def init(key: Array) -> dict:
        params = objective.init(key)
        sampled = objective.sampled(params)
        adapters = lora.init(jax.random.fold_in(key, STREAM), sampled, settings.rank, settings.targets)
        helpers = {name: params[name] for name in objective.helpers if name in params}
        return {**lora.union(lora.split(sampled)[0], adapters), **helpers}

    def draw(key: Array, step: Array, frozen: dict, batch: dict) -> dict:
        return objective.draw(key, step, frozen["others"], batch)

    def init_frozen(key: Array) -> dict:
        _, base = lora.split(objective.init_sampled(key))
        dtype = jnp.dtype(settings.dtype)
        return {"base": jax.tree.map(lambda x: x.astype(dtype), base), "others": objective.init_frozen(key)}

    def load_frozen(abstract: dict) -> dict:
        others = objective.load_frozen(abstract["others"]) if objective.load_frozen else ()
        return {"base": load_base(abstract["base"]), "others": others}

    def assemble(trained: dict, frozen: dict) -> dict:
        return lora.assemble(frozen["base"], trained, scale(settings))

    return objective._replace(init=init, draw=draw, init_frozen=init_frozen, load_frozen=load_frozen, assemble=assemble)


def scale(settings: ConfigDict) -> float:
    """The factor of the adapters, alpha / rank."""
    return settings.alpha / settings.rank if settings.alpha else 1.0


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of `config.lora` that cannot work."""
    settings = config.lora
    check_choice("config.lora.dtype", settings.dtype, ("float32", "bfloat16"))
    for target in settings.targets:
        try:
            re.compile(target)
        except (re.error, TypeError) as error:
            raise UserError(f"config.lora.targets: {target!r} is no regular expression ({error}).") from error
    require(
        settings.rank == 0 or config.init_from != "",
        f"config.lora.rank = {settings.rank} needs the weights that are adapted; name their workdir in "
        "config.init_from, or set rank = 0.",
    )


def is_rearranged(model: ConfigDict) -> bool:
    """Whether the base of a routed model stands in other places than in a residual one, as that of a SiT does."""
    return model.family == "sit" and model.routing.kind != "residual"
