"""The ordinary algorithm: one network, one objective, one optimizer, and a moving average of the weights."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from dar_jax.objectives import Objective
from dar_jax.training.algorithm import Algorithm
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.update import averaged, value_and_grad


class TrainState(flax.struct.PyTreeNode):
    """What a run carries from step to step.

    Attributes:
      step: optimizer steps taken, int32.
      params: float32 master weights of what is trained.
      ema: their exponential moving average, the weights that samples come from.
      opt_state: of optax.
    """

    step: Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def build(config: ConfigDict, objective: Objective) -> Algorithm:
    """Minimises `objective` with the optimizer of `config.optimizer`, in the microbatches of `config.train`.

    The metrics are those of the objective with "loss" (mean over the batch), "grad_norm" (before clipping) and
    "param_norm" (of the new weights, which overflows before they do); for every helper of the objective "grad_norm_"
    and its name. Randomness follows from config.seed and the step.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    seed, num_micro, decay = config.seed, config.train.accumulate_steps, config.optimizer.ema_decay

    def init(key: Array) -> TrainState:
        params = objective.init(key)
        ema = jax.tree.map(
            jnp.copy, objective.sampled(params)
        )  # a copy, because the step donates the state and no buffer twice
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params))

    def step(state: TrainState, frozen: tuple, batch: dict) -> tuple[TrainState, dict]:
        drawn = objective.draw(jax.random.fold_in(jax.random.key(seed), state.step), state.step, frozen, batch)

        def loss(trained: dict, drawn: dict) -> tuple[Array, dict]:
            return objective.loss(objective.assemble(trained, frozen), drawn)

        metrics, grads = value_and_grad(loss, state.params, drawn, num_micro)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = averaged(state.ema, objective.sampled(params), decay)
        metrics |= {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        metrics |= {f"grad_norm_{name}": optax.global_norm(grads[name]) for name in objective.helpers if name in grads}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    frozen = objective.init_frozen, objective.load_frozen
    passes = 2.0 if config.lora.rank else 3.0
    return Algorithm(init, step, objective.sample, *frozen, objective.assemble, forward_passes=passes)
