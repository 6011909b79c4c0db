"""What the steps of all algorithms have in common: gradients in microbatches, the moving average, skipped steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def value_and_grad(
    loss: Callable[[Any, dict], tuple[Array, dict]], params: Any, drawn: dict, num_micro: int
) -> tuple[dict[str, Array], Any]:
    """The loss of a batch, its metrics and its gradient, one microbatch after the other.

    Args:
      loss: (params, drawn) -> (mean over the samples, further scalars by name), as `objectives.Objective.loss`.
      params: to differentiate by.
      drawn: a batch, samples on the leading axis, whose number is divisible by num_micro.
      num_micro: microbatches.

    Returns:
      ({"loss": ..., further scalars}, gradient): means over the microbatches.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if num_micro == 1:
        (value, metrics), grads = gradient(params, drawn)
        return {"loss": value, **metrics}, grads

    # A microbatch takes every num_micro-th example, so that it stays spread over all devices.
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, num_micro, *a.shape[1:]), 1, 0), drawn)

    def accumulate(total, drawn):
        return jax.tree.map(jnp.add, total, gradient(params, drawn)), None

    first = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], micro))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(accumulate, zero, micro)
    (value, metrics), grads = jax.tree.map(lambda a: a / num_micro, total)
    return {"loss": value, **metrics}, grads


def averaged(ema: Any, params: Any, decay: float) -> Any:
    """The moving average after one more step: decay * ema + (1 - decay) * params."""
    return optax.incremental_update(params, ema, 1 - decay)


def skipping_failures(step: Callable) -> Callable:
    """The step of an algorithm, which changes nothing but state.step if one of its metrics is not finite."""

    def guarded(state, frozen, batch):
        new, metrics = step(state, frozen, batch)
        is_finite = jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
        kept = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)
        return kept.replace(step=new.step), metrics

    return guarded
