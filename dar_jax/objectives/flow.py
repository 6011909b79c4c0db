"""Flow and score matching: the network predicts what leads from noise to data at a random time (config.diffusion)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from dar_jax import conditions, diffusion, models
from dar_jax.diffusion import guidance, sampler
from dar_jax.objectives.objective import Objective


def build(config: ConfigDict, model: nn.Module | None = None) -> Objective:
    """The objective of `config.diffusion` for `model`, sampled as `config.sampler` says.

    Without a `model` it is the one of `config.model`. The batch is {"x1": [B, H, W, C], "condition": ...}; `draw` adds
    "t" and "x0".
    """
    model, kind = model or models.build(config.model), conditions.build(config.model)
    process = diffusion.build(config.diffusion)
    solve = sampler.build(config.sampler, process)
    guide = {
        "scale": config.sampler.cfg_scale,
        "channels": config.sampler.cfg_channels,
        "interval": config.sampler.cfg_interval,
    }

    def predict(params, x_t: Array, t: Array, condition: dict) -> Array:
        return model.apply({"params": params}, x_t, t, condition).prediction

    def init(key: Array) -> dict:
        x_t = jnp.zeros((1, model.input_size, model.input_size, model.channels))
        condition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kind.abstract(1))
        return model.init(key, x_t, jnp.zeros(1), condition)["params"]

    def draw(key: Array, batch: dict) -> dict:
        process_key, condition_key = jax.random.split(key)
        t, x0 = process.draw(process_key, batch["x1"])
        return {**batch, "t": t, "x0": x0, "condition": kind.drop(condition_key, batch["condition"])}

    def loss(params, drawn: dict) -> tuple[Array, dict]:
        def output(x_t, t):
            return predict(params, x_t, t, drawn["condition"])

        return jnp.mean(process.loss(output, drawn["x1"], drawn["x0"], drawn["t"])), {}

    def sample(params, x0: Array, keys: Array, condition: dict) -> Array:
        def conditional(x_t, t, condition):
            return predict(params, x_t, t, condition)

        return solve(guidance.guided(conditional, condition, kind.null(condition), **guide), x0, keys)

    return Objective(init, draw, loss, sample)
