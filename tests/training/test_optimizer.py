"""Schedules and AdamW against what their definitions say, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.training.optimizer import check, make_optimizer, make_schedule
from tests.training import tiny


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


def test_groups_have_their_own_rate_and_decay_or_stand_still():
    """One step of AdamW from zero moments is the sign of the gradient times the rate, plus the decay."""
    groups = (("head/.*", {"learning_rate": 0.25, "weight_decay": 0.0}), (".*/table", {"frozen": True}))
    config = optimizer_config(weight_decay=0.1, groups=groups)
    config.warmup_steps = 0
    params = {
        "head": {"kernel": jnp.full((2, 3), 2.0)},
        "label": {"table": jnp.full((4,), 2.0), "kernel": jnp.full((3,), 2.0)},
    }
    optimizer = make_optimizer(config, 20)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.25, rtol=1e-5)
    np.testing.assert_allclose(updates["label"]["kernel"], -0.5 * (1 + 0.1 * 2), rtol=1e-5)
    np.testing.assert_array_equal(updates["label"]["table"], 0)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * (6 + 3)  # a frozen parameter has none


def test_a_frozen_gradient_does_not_count_in_the_clipped_norm():
    config = optimizer_config(clip_norm=1.0, groups=(("a", {"frozen": True}),))
    optimizer = make_optimizer(config, 20)
    params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    gradients = {"a": jnp.full(3, 1e6), "b": jnp.full(4, 0.25)}  # the norm of b is 0.5
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    (mu,) = [x for x in jax.tree.leaves(state) if x.shape == (4,) and x[0] > 0.01]
    np.testing.assert_allclose(mu, 0.1 * 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("[", {"frozen": True}),), r'groups\[0\]: "\[" is no regular expression'),
        ((("a", {"frozn": True}),), r'groups\[0\] = "frozn" is unknown. Did you mean "frozen"'),
        ((("a", {"learning_rate": -1.0}),), r"groups\[0\].learning_rate = -1.0 must be at least 0 and finite"),
        ((("a",),), r"groups\[0\] = .* must be a regular expression and its settings"),
    ],
)
def test_groups_that_cannot_work(groups, message):
    with pytest.raises(UserError, match=message):
        check(optimizer_config(groups=groups))


def test_a_group_without_parameters_is_a_typo():
    optimizer = make_optimizer(optimizer_config(groups=(("haed/.*", {"frozen": True}),)), 20)
    with pytest.raises(UserError, match=r'no parameter is left for "haed/.\*"; paths are like head/kernel'):
        optimizer.init({"head": {"kernel": jnp.ones(2)}})


def test_groups_survive_the_state_of_a_run():
    """Also on a mesh, where the state's shardings come from the names of the parameters."""
    config = tiny.make_config()
    config.optimizer.groups = (("stack/.*", {"frozen": True}), ("head/.*", {"learning_rate": 1e-2}))
    (before, after), _ = tiny.run(config, tiny.make_mesh(2, 4), 1)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before.params, after.params)
    assert not any(jax.tree.leaves(moved["stack"])) and all(jax.tree.leaves(moved["head"]["dense"]))
