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
from dar_jax.models.build import ROUTED
from dar_jax.models.mmdit import MMDiT
from dar_jax.routing import keeps_function, uniform, warm_start, warm_start_streams


def with_teacher(config: ConfigDict) -> ConfigDict:
    """The config of a distillation whose student starts from its teacher, unless `config.init_from` says otherwise.

    Changes nothing of other configs. Raises UserError if `config.teacher` is no run.
    """
    if config.algorithm != "dmd":
        return config
    require(config.teacher != "", "config.algorithm = dmd distils a run; name its workdir with --config.teacher.")
    check_init_from(config, config.teacher, "config.teacher")
    config = config.copy_and_resolve_references()
    config.init_from = config.init_from or config.teacher
    return config


def teacher_of(config: ConfigDict) -> ConfigDict:
    """The config of the teacher, which computes in the types of the student's.

    Without `config.teacher`, as in planning, it is a residual model of the same size.
    """
    teacher = load_config(config.teacher) if config.teacher else config.copy_and_resolve_references()
    if not config.teacher:
        teacher.algorithm, teacher.lora.rank, teacher.model.routing.kind = "flow", 0, "residual"
    teacher.model.dtype, teacher.model.routing.implementation = config.model.dtype, config.model.routing.implementation
    teacher.repa.target = "none"
    return teacher


def load_teacher(config: ConfigDict, abstract: dict) -> dict:
    """The EMA weights of the teacher, in the types and on the shardings of `abstract`.

    Raises UserError unless `config.teacher` holds the checkpoint that `config.dmd.weights` names.
    """
    step = _check_weights("teacher", config.teacher, "dmd.weights", config.dmd.weights)
    weights, _ = restore_ema(config.teacher, abstract, step)
    say(f"the teacher is the EMA of step {step} of {config.teacher}")
    return weights


def check_init_from(config: ConfigDict, path: str | None = None, name: str = "config.init_from") -> ConfigDict:
    """The config of the run that `config.init_from` names, or of the one in `path`, which the field `name` has named.

    Raises UserError unless its weights suit the model of `config`: they must be of the same shapes and objective, and
    of the same routing or of none.
    """
    path = path or config.init_from
    if not (files.path(path) / "config.json").exists() or latest_step(path) is None:
        raise UserError(
            f'{name} = "{path}" has no config.json and checkpoint; name a workdir that dar_jax.main or '
            "dar_jax.convert wrote."
        )
    source = load_config(path)
    require(
        source.lora.rank == 0,
        f'{name} = "{path}" holds adapters of "{source.init_from}"; name that, or merge them first with '
        f"python -m dar_jax.convert --kind=merged --workdir={path} --output=DIR.",
    )
    may_differ = ["label_dropout", "dtype", "remat", "routing"]
    if source.model.family == "mmdit" and source.model.text == "embeddings":  # no weight is of their length or number
        may_differ += ["input_size", "text_length"]
        may_differ += [] if source.model.text_encoder else ["text_encoder"]  # converted weights do not tell it
    fields = [f"model.{field}" for field in source.model if field not in may_differ]
    fields += ["diffusion.interpolant", "diffusion.prediction"]
    if source.model.routing.kind != "residual" or config.model.routing.kind not in ("residual", *ROUTED):
        fields += ["model.routing"]
    if difference := first_difference(source, config, fields):
        raise UserError(
            f'{name} = "{path}" is of {difference}; make them equal, or start without it. (A residual '
            "run may start DAR or delta too.)"
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
    step = int(config.lora.base.partition(":")[0])
    found, _ = restore_ema(config.init_from, routing, step, partial=True)
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
    donated = (0,) if isinstance(model, MMDiT) else ()  # the arrays of a SiT change their shapes
    return jax.jit(place, out_shardings=shardings, donate_argnums=donated)(params)


def pin_weights(config: ConfigDict, workdir: str) -> ConfigDict:
    """A config that says which checkpoints are frozen: `lora.base` of `init_from`, and `dmd.weights` of `teacher`.

    They are those of the run in `workdir`. A new run takes the latest ones, unless its config names others. Changes
    nothing without adapters and teacher. Raises UserError if a directory does not hold them any more.
    """
    config = config.copy_and_resolve_references()
    stored = load_config(workdir) if latest_step(workdir) is not None else config
    if config.lora.rank:
        check_init_from(config)
        config.lora.base = _pinned("init_from", config.init_from, "lora.base", stored.lora.base)
    if config.algorithm == "dmd":
        config.dmd.weights = _pinned("teacher", config.teacher, "dmd.weights", stored.dmd.weights)
    return config


def _pinned(source: str, path: str, field: str, value: str) -> str:
    """`value` if its checkpoint is there; without a value, that of the latest checkpoint."""
    if value:
        _check_weights(source, path, field, value)
        return value
    step = latest_step(path)
    return f"{step}:{weights_fingerprint(path, step)}"


def _check_weights(source: str, path: str, field: str, value: str) -> int:
    """The step of the checkpoint in config.<source> = `path` that config.<field> = `value` names.

    Raises UserError unless it is there with the same weights.
    """
    step, _, wanted = value.partition(":")
    require(
        step.isdecimal() and re.fullmatch("[0-9a-f]{64}", wanted) is not None,
        f'config.{field} = "{value}" must be a step and a SHA-256, as a run writes it; leave it empty.',
    )
    step, steps = int(step), saved_steps(path)
    require(
        step in steps,
        f'config.{source} = "{path}" has no checkpoint of step {step} any more, which this run trains on; it has '
        f"{steps}. Put a copy of it there, or name a directory that has it.",
    )
    found = weights_fingerprint(path, step)
    require(
        found == wanted,
        f'config.{source} = "{path}" does not hold what this run trains on: the weights of step {step} have the '
        f"SHA-256 {found[:12]}..., not {wanted[:12]}...; name the directory of those weights.",
    )
    return step


def load_base(config: ConfigDict, abstract: dict) -> dict:
    """The frozen weights of a run with `config.lora`, in the types and on the shardings of `abstract`.

    Raises UserError unless `config.init_from` holds the checkpoint that `config.lora.base` names.
    """
    source, (mesh, *_) = check_init_from(config), [leaf.sharding.mesh for leaf in jax.tree.leaves(abstract)]
    step = _check_weights("init_from", config.init_from, "lora.base", config.lora.base)
    dtype = jnp.dtype(config.lora.dtype)
    _, weights = lora.split(_abstract(source, mesh))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), weights)
    base, _ = restore_ema(config.init_from, weights, step, partial=True)
    say(f"the frozen base is the EMA of step {step} of {config.init_from}")
    is_placed = source.model.routing.kind != "residual" or config.model.routing.kind == "residual"
    return base if is_placed else _routed(base, config, abstract)
