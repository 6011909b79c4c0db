"""Schedules and AdamW against what their definitions say, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import default
from dar_jax.training.optimizer import make_optimizer, make_schedule


def optimizer_config(**fields):
    config = default().optimizer
    config.update(learning_rate=0.5, warmup_steps=4, **fields)
    return config


def test_constant_schedule_warms_up_linearly_from_zero():
    schedule = make_schedule(optimizer_config(schedule="constant"), 20)
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 2, 4, 5, 100)], [0, 0.125, 0.25, 0.5, 0.5, 0.5])


def test_cosine_schedule_reaches_zero_at_the_last_step():
    schedule = make_schedule(optimizer_config(schedule="cosine"), 20)
    steps = np.array([0, 2, 4, 8, 12, 16, 20, 30])
    cosine = 0.25 * (1 + np.cos(np.pi * (np.clip(steps, 4, 20) - 4) / 16))
    expected = np.where(steps < 4, 0.5 * steps / 4, cosine)
    np.testing.assert_allclose([schedule(i) for i in steps], expected, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warmup_the_first_step_takes_the_full_rate(schedule):
    config = optimizer_config(schedule=schedule)
    config.warmup_steps = 0
    assert make_schedule(config, 20)(0) == 0.5


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_adamw_with_clipping_equals_numpy(clip_norm):
    """Five steps of Loshchilov & Hutter's AdamW; decay is scaled by the learning rate, clipping is by global norm."""
    config = optimizer_config(clip_norm=clip_norm, weight_decay=0.1, b1=0.8, b2=0.95)
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=5)}
    gradients = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(5)]

    optimizer = make_optimizer(config, 20)
    actual = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = optimizer.init(actual)
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for i, gradient in enumerate(gradients):
        updates, state = optimizer.update({k: jnp.float32(v) for k, v in gradient.items()}, state, actual)
        actual = {k: actual[k] + updates[k] for k in actual}

        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        rate = 0.5 * min(i / 4, 1.0)
        for k, g in gradient.items():
            first[k] = 0.8 * first[k] + 0.2 * factor * g
            second[k] = 0.95 * second[k] + 0.05 * (factor * g) ** 2
            direction = first[k] / (1 - 0.8 ** (i + 1)) / (np.sqrt(second[k] / (1 - 0.95 ** (i + 1))) + 1e-8)
            params[k] = params[k] - rate * (direction + 0.1 * params[k])
    for k in params:
        np.testing.assert_allclose(actual[k], params[k], rtol=1e-5)
