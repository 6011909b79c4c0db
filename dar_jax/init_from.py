"""The weights of another run, `config.init_from`: what a run starts from, or the frozen base of its adapters.

The config of a run with adapters keeps the step and the SHA-256 of its base. Whoever resumes, samples or diagnoses the
run needs the same base, and is told if `config.init_from` holds another one.
"""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import files, models, objectives, sharding
from dar_jax.checkpoint import (
    first_difference,
    latest_step,
    load_config,
    restore_ema,
    saved_steps,
    weights_fingerprint,
)
from dar_jax.errors import UserError, require
from dar_jax.logs import say
from dar_jax.models import lora
from dar_jax.models.mmdit import MMDiT
from dar_jax.routing import keeps_function, uniform, warm_start, warm_start_streams


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
    require(
        source.lora.rank == 0,
        f'config.init_from = "{path}" holds adapters of "{source.init_from}"; name that, or merge them first with '
        f"python -m dar_jax.convert --kind=merged --workdir={path} --output=DIR.",
    )
    may_differ = ["label_dropout", "dtype", "remat", "routing"]
    if source.model.family == "mmdit" and source.model.text == "embeddings":  # no weight is of their length or number
        may_differ += ["input_size", "text_length"]
        may_differ += [] if source.model.text_encoder else ["text_encoder"]  # converted weights do not tell it
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


def restore_initial(config: ConfigDict, trained: dict, mesh: Mesh) -> dict:
    """What a run trains and averages, from `config.init_from`: EMA weights, and uniform routing if they are residual.

    Args:
      config: of the run.
      trained: the fresh EMA on its shardings. With `config.lora` it holds adapters, which stay as they are.
      mesh: the devices.
    """
    source, model = check_init_from(config), models.build(config.model)
    becomes_routed = source.model.routing.kind == "residual" and model.layout is not None
    if becomes_routed and not keeps_function(model.layout):
        say(
            f"warning: these are residual weights, and chunks of {model.layout.chunk_size} summarised by their last "
            "output change their function; config.model.routing.summary = sum or chunk_size = 1 keep it"
        )
    if config.lora.rank == 0:
        ema, step = restore_ema(config.init_from, _abstract(source, mesh))
        say(f"started from the EMA weights of step {step} of {config.init_from}")
        return _routed(ema, config, trained) if becomes_routed else ema
    if becomes_routed:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        return jax.jit(lambda tree: uniform(tree, model.query), out_shardings=shardings)(trained)
    routing, _ = lora.split(_abstract(source, mesh))
    if not routing:
        return trained
    found, _ = restore_ema(config.init_from, routing, _base_of(config)[0], partial=True)
    return lora.union(trained, found)


def _abstract(source: ConfigDict, mesh: Mesh) -> dict:
    """Shapes and shardings of the weights of a run."""
    objective = objectives.build(source)
    return sharding.abstract(mesh, lambda: objective.init_sampled(jax.random.key(0)))


def _routed(params: dict, config: ConfigDict, wanted: dict) -> dict:
    """Residual parameters in the places of the routed model of `config`, those that `wanted` has, on its shardings."""
    model = models.build(config.model)
    paths = traverse_util.flatten_dict(wanted)

    def place(params: dict) -> dict:
        if isinstance(model, MMDiT):
            warm = warm_start_streams(params, model.layout, model.query, model.streams)
        else:
            warm = warm_start(params, model.layout, model.query)
        leaves = traverse_util.flatten_dict(warm)
        return traverse_util.unflatten_dict({path: leaves[path] for path in paths})

    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return jax.jit(place, out_shardings=shardings, donate_argnums=0)(params)


def pin_base(config: ConfigDict, workdir: str) -> ConfigDict:
    """A config whose `lora.base` says which checkpoint of `init_from` is the base: that of the run in `workdir`.

    A new run takes the latest one, unless `config.lora.base` names another. Changes nothing without `config.lora`.
    Raises UserError if `init_from` does not hold the base of the run any more.
    """
    if config.lora.rank == 0:
        return config
    config = config.copy_and_resolve_references()
    if latest_step(workdir) is not None:
        config.lora.base = load_config(workdir).lora.base
    if config.lora.base:
        _check_base(config)
    else:
        check_init_from(config)
        step = latest_step(config.init_from)
        config.lora.base = f"{step}:{weights_fingerprint(config.init_from, step)}"
    return config


def _base_of(config: ConfigDict) -> tuple[int, str]:
    """Step and SHA-256 of the base."""
    step, _, fingerprint = config.lora.base.partition(":")
    require(
        step.isdecimal() and re.fullmatch("[0-9a-f]{64}", fingerprint) is not None,
        f'config.lora.base = "{config.lora.base}" must be a step and a SHA-256, as a run writes it; leave it empty.',
    )
    return int(step), fingerprint


def _check_base(config: ConfigDict) -> None:
    path, (step, wanted) = config.init_from, _base_of(config)
    check_init_from(config)
    steps = saved_steps(path)
    require(
        step in steps,
        f'config.init_from = "{path}" has no checkpoint of step {step} any more, on which these adapters were trained; '
        f"it has {steps}. Put a copy of it there, or name a directory that has it.",
    )
    found = weights_fingerprint(path, step)
    require(
        found == wanted,
        f'config.init_from = "{path}" is not the base of these adapters: the weights of step {step} have the SHA-256 '
        f"{found[:12]}..., not {wanted[:12]}...; name the directory of those weights.",
    )


def load_base(config: ConfigDict, abstract: dict) -> dict:
    """The frozen weights of a run with `config.lora`, in the types and on the shardings of `abstract`.

    Raises UserError unless `config.init_from` holds the checkpoint that `config.lora.base` names.
    """
    _check_base(config)
    step, _ = _base_of(config)
    source, (mesh, *_) = check_init_from(config), [leaf.sharding.mesh for leaf in jax.tree.leaves(abstract)]
    dtype = jnp.dtype(config.lora.dtype)
    _, weights = lora.split(_abstract(source, mesh))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), weights)
    base, _ = restore_ema(config.init_from, weights, step, partial=True)
    say(f"the frozen base is the EMA of step {step} of {config.init_from}")
    is_placed = source.model.routing.kind != "residual" or config.model.routing.kind == "residual"
    return base if is_placed else _routed(base, config, abstract)
