"""Adapters of a run as files, from files, and merged into the weights: what the door `convert` does with them."""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from dar_jax import files, models, objectives, sharding
from dar_jax.checkpoint import load_config, restore_ema, write_weights
from dar_jax.config import default
from dar_jax.errors import UserError, require
from dar_jax.evaluation.sampling import restore
from dar_jax.init_from import pin_weights
from dar_jax.models import lora
from dar_jax.pretrained import lora_file


def _config_with_adapters(workdir: str) -> ConfigDict:
    config = load_config(workdir)
    require(config.lora.rank > 0, f'--workdir = "{workdir}" is of a run without adapters (config.lora.rank = 0).')
    sharding.fit(config.mesh)
    return config


def _places(config: ConfigDict) -> dict[str, lora_file.Place]:
    layout, model = models.build(config.model).layout, config.model
    per_step = 1 if layout is None or model.family != "sit" else layout.sublayers_per_step // 2
    return lora_file.places(model.family, model.depth, per_step)


def export(workdir: str, output: str) -> list[str]:
    """Writes the EMA of a run's adapters, and of its routing if it has one, to a directory; returns the paths.

    Raises UserError if the run has no adapters, or adapts a layer that the published model has not.
    """
    config = _config_with_adapters(workdir)
    mesh, objective = sharding.make_mesh(config.mesh), objectives.build(config)
    with sharding.use(mesh):
        abstract = sharding.abstract(mesh, lambda: objective.init_sampled(jax.random.key(0)))
        trained, _ = restore_ema(workdir, abstract)
    routing, adapters = lora.split(jax.device_get(trained))
    written = [lora_file.write(output, adapters, _places(config), config.lora.alpha or float(config.lora.rank))]
    if routing:
        written.append(lora_file.write_routing(output, routing, config.model.routing.to_dict()))
    return written


def load(source: str, base: str, output: str) -> ConfigDict:
    """Makes a workdir of published adapters on the weights of the workdir `base`; returns its config.

    `source` is a file of adapters, or a directory that `export` wrote. Raises UserError as `lora_file.read`, and if the
    routing of the adapters does not suit the base.
    """
    config = load_config(base)
    directory = files.path(source)
    adapters_path, routing_path = str(directory), directory / lora_file.ROUTING
    routing: dict = {}
    if directory.is_dir():
        adapters_path = str(directory / lora_file.ADAPTERS)
        if routing_path.exists():
            routing, settings = lora_file.read_routing(str(routing_path))
            config.model.routing.update(settings)
    whole = objectives.build(config)
    weights = sharding.unbox(jax.eval_shape(lambda: whole.init_sampled(jax.random.key(0))))
    fresh_routing, frozen = lora.split(weights)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(frozen, sep="/").items()}
    adapters, scale = lora_file.read(adapters_path, _places(config), shapes)
    if jax.tree.map(jnp.shape, routing) != jax.tree.map(jnp.shape, fresh_routing):
        raise UserError(
            f'--input = "{source}" and --base = "{base}": the routing of the adapters is not that of the model; give '
            "the directory that dar_jax.convert --kind=lora --workdir wrote."
        )
    ranks = {
        path.removesuffix("/lora_a"): leaf.shape[-1]
        for path, leaf in traverse_util.flatten_dict(adapters, sep="/").items()
        if path.endswith("/lora_a")
    }
    rank = max(ranks.values())
    config.init_from = base
    targets = tuple(re.escape(f"{layer}/kernel") for layer in sorted(ranks))
    config.lora.update(rank=rank, alpha=scale * rank, dtype=config.model.dtype, targets=targets)
    config = pin_weights(config, output)
    write_weights(output, config, lora.union(adapters, routing))
    return config


def merge(workdir: str, output: str) -> ConfigDict:
    """Makes a workdir of the weights W + s A B of a run with adapters, as the EMA of step 0; returns its config."""
    config = _config_with_adapters(workdir)
    config.lora.dtype = "float32"
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        params, _ = restore(config, workdir, mesh, None)
        merged = jax.jit(lora.merge)(params)
    config.lora, config.init_from = default().lora, ""
    write_weights(output, config, merged)
    return config
