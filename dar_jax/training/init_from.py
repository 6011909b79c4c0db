"""Starting a run from the weights of another one: `config.init_from`."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import files, models, objectives, sharding
from dar_jax.checkpoint import first_difference, latest_step, load_config, restore_ema
from dar_jax.errors import UserError
from dar_jax.logs import say
from dar_jax.routing import keeps_function, warm_start


def check_init_from(config: ConfigDict) -> ConfigDict:
    """The config of the run that `config.init_from` names.

    Raises UserError unless its weights suit the model of `config`: they must be of the same shapes and objective, and
    of the same routing or of none.
    """
    path = config.init_from
    if not (files.path(path) / "config.json").exists() or latest_step(path) is None:
        raise UserError(
            f'config.init_from = "{path}" has no config.json and checkpoint; name a workdir that dar_jax.main or '
            "dar_jax.convert wrote."
        )
    source = load_config(config.init_from)
    may_differ = ("label_dropout", "dtype", "remat", "routing")
    fields = [f"model.{name}" for name in source.model if name not in may_differ]
    fields += ["diffusion.interpolant", "diffusion.prediction"]
    if source.model.routing.kind != "residual":
        fields += ["model.routing"]
    if difference := first_difference(source, config, fields):
        raise UserError(
            f'config.init_from = "{path}" is of {difference}; make them equal, or start without it. (A residual '
            "run may start any routing.)"
        )
    return source


def restore_initial(config: ConfigDict, abstract, mesh: Mesh) -> Any:
    """The EMA weights of `config.init_from` on the shardings of `abstract`; uniform routing if they are residual."""
    source, model = check_init_from(config), models.build(config.model)
    objective = objectives.build(source)
    weights = sharding.abstract(mesh, lambda: objective.init_sampled(jax.random.key(0)))
    ema, step = restore_ema(config.init_from, weights)
    say(f"started from the EMA weights of step {step} of {config.init_from}")
    if source.model.routing.kind != "residual" or model.layout is None:
        return ema
    if not keeps_function(model.layout):
        say(
            f"warning: these are residual weights, and chunks of {model.layout.chunk_size} summarised by their last "
            "output change their function; config.model.routing.summary = sum or chunk_size = 1 keep it"
        )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda params: warm_start(params, model.layout, model.query), out_shardings=shardings)(ema)
