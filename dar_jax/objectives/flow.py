"""Flow and score matching: the network predicts what leads from noise to data at a random time (config.diffusion)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from dar_jax import conditions, diffusion, models
from dar_jax.diffusion import guidance, sampler
from dar_jax.objectives.objective import HiddenTerm, Objective, nothing


def build(config: ConfigDict, model: nn.Module | None = None, term: HiddenTerm | None = None) -> Objective:
    """The objective of `config.diffusion` for `model`, sampled as `config.sampler` says.

    Without a `model` it is the one of `config.model`. The batch is {"x1": [B, H, W, C], "condition": ...} and what
    `term` needs, which is added to the loss; `draw` adds "t" and "x0".
    """
    model, kind = model or models.build(config.model), conditions.build(config.model)
    process = diffusion.build(config.diffusion)
    solve = sampler.build(config.sampler, process, config.model.patch_size)
    guide = {
        "scale": config.sampler.cfg_scale,
        "channels": config.sampler.cfg_channels,
        "interval": config.sampler.cfg_interval,
        "rescaled_patch": config.model.patch_size if config.sampler.cfg_rescale else 0,
    }

    def init(key: Array) -> dict:
        side = config.model.input_size
        x_t = jnp.zeros((1, side, side, config.model.channels))
        condition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kind.abstract(1))
        params = model.init(key, x_t, jnp.zeros(1), condition)["params"]
        helper = term.init(jax.random.fold_in(key, 1)) if term else {}
        return {**params, term.name: helper} if helper else params

    def draw(key: Array, step: Array, frozen, batch: dict) -> dict:
        process_key, condition_key = jax.random.split(key)
        t, x0 = process.draw(process_key, batch["x1"])
        condition = kind.drop(condition_key, batch["condition"])
        drawn = {"x1": batch["x1"], "x0": x0, "t": t, "condition": condition}
        return {**drawn, term.name: term.draw(step, frozen, batch)} if term else drawn

    def loss(params: dict, drawn: dict) -> tuple[Array, dict]:
        found = {}

        def predict(x_t, t):
            blocks = term.blocks if term else ()
            output = model.apply({"params": params}, x_t, t, drawn["condition"], hidden_at=blocks)
            found["states"] = output.hidden
            return output.prediction

        value = jnp.mean(process.loss(predict, drawn["x1"], drawn["x0"], drawn["t"]))
        if term is None:
            return value, {}
        added, metrics = term.loss(params.get(term.name, {}), found["states"], drawn[term.name])
        return value + added, {"loss_flow": value, **metrics}

    def sample(params: dict, x0: Array, keys: Array, condition: dict) -> Array:
        def conditional(x_t, t, condition):
            return model.apply({"params": params}, x_t, t, condition).prediction

        return solve(guidance.guided(conditional, condition, kind.null(condition), **guide), x0, keys)

    helpers = (term.name,) if term else ()
    init_frozen, load_frozen = (term.init_frozen, term.load_frozen) if term else (nothing, None)
    return Objective(init, draw, loss, sample, helpers, init_frozen, load_frozen)
