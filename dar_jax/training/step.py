"""One train step; the loop, the planner and the tests run this function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dar_jax import conditions
from dar_jax.diffusion import objective
from dar_jax.models import SiT
from dar_jax.training.state import TrainState


def make_train_step(config: ConfigDict, model: SiT, optimizer: optax.GradientTransformation) -> Callable:
    """Returns step(state, batch) -> (state, metrics), a pure function to jit.

    batch: {"image": float32 [B, H, W, C] in [-1, 1], "label": int32 [B]}. metrics: float32 scalars "loss" (mean over
    the batch), "grad_norm" (before clipping) and "param_norm" (of the new weights, which overflows before they do).
    With config.train.max_skipped > 0 a step whose metrics are not all finite changes nothing but state.step.
    Randomness follows from config.seed and state.step alone.
    """
    num_micro = config.train.accumulate_steps
    labels = conditions.build(config.model)

    def loss_fn(params, x1, x0, t, y, key):
        condition = labels.drop(key, {"label": y})

        def predict(x_t, t):
            return model.apply({"params": params}, x_t, t, condition).prediction

        return jnp.mean(objective.loss_per_example(predict, x1, x0, t, config.diffusion))

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        draw_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        x1, y = batch["image"], batch["label"]
        t, x0 = objective.draw(draw_key, x1, config.diffusion)

        if num_micro == 1:
            loss, grads = jax.value_and_grad(loss_fn)(state.params, x1, x0, t, y, label_key)
        else:
            # Every num_micro-th example, so that each microbatch stays spread over all devices.
            micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, num_micro, *a.shape[1:]), 1, 0), (x1, x0, t, y))

            def accumulate(total, inputs):
                micro_batch, key = inputs
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(state.params, *micro_batch, key)), None

            zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
            total, _ = jax.lax.scan(accumulate, zero, (micro, jax.random.split(label_key, num_micro)))
            loss, grads = jax.tree.map(lambda a: a / num_micro, total)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - config.optimizer.ema_decay)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
        }
        new = TrainState(state.step + 1, params, ema, opt_state)
        if config.train.max_skipped:
            is_finite = jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
            kept = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)
            new = kept.replace(step=new.step)
        return new, metrics

    return step
