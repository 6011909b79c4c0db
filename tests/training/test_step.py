"""The train step: one update by hand, gradient accumulation, and the same losses on every mesh."""

import functools
import re

import jax
import numpy as np
import pytest

from dar_jax import config as config_lib
from tests.training import tiny


def moments(state):
    """The AdamW moments in optax's state."""
    (found,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return found.mu, found.nu


@functools.cache
def two_steps(accumulate_steps):
    config = tiny.make_config()
    config.model.label_dropout = 0.3
    config.optimizer.weight_decay = 0.1
    config.train.update(batch_size=32, accumulate_steps=accumulate_steps)
    return tiny.run(config, tiny.make_mesh(4, 2), 2)


ALL_SHAPES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)]
QUICK = {"residual": [(2, 2, 2)], "static_t": [(4, 2, 1), (2, 2, 2)], "dynamic": [(2, 2, 2)]}
VARIANTS = ("residual", "static", "static_t", "dynamic", "long_skip", "hyper", "mhc")


@pytest.mark.parametrize(
    ("variant", "shapes"),
    [*QUICK.items(), *(pytest.param(variant, ALL_SHAPES, marks=pytest.mark.slow) for variant in VARIANTS)],
)
def test_losses_do_not_depend_on_the_mesh(variant, shapes):
    """Twenty steps, with label dropout, within 1e-5 relative of one device; every device holds its share only."""
    config = config_lib.route(tiny.make_config(), variant)
    states, expected = tiny.run(config, tiny.make_mesh(1, 1), 20)
    expected = np.array([m["loss"] for m in expected])
    assert np.ptp(expected) > 0.01
    for shape in shapes:
        states, metrics = tiny.run(config, tiny.make_mesh(*shape), 20)
        np.testing.assert_allclose([m["loss"] for m in metrics], expected, rtol=1e-5, err_msg=str(shape))
        for state in (states[0], states[20]):
            check_shards(state, *shape)


def check_shards(state, data, fsdp, tensor):
    """Large arrays of weights, EMA and moments are split over fsdp, and matrices inside the model over tensor."""
    whole = re.compile("label|patch|timestep/dense_0|head/dense|skip/kernel|connection_")
    for tree in (state.params, state.ema, *moments(state)):
        large = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree)
        ]
        large = [(path, x) for path, x in large if x.size >= 256 and path.endswith(("kernel", "table"))]
        assert len(large) > 8
        for path, x in large:
            parts = fsdp if whole.search(path) else fsdp * tensor
            assert x.addressable_shards[0].data.size * parts == x.size, (path, x.shape)


def test_one_update_equals_numpy():
    """From the gradient that the first moment shows: second moment, weights, EMA, norms and the step count."""
    (before, after, _), (metrics, _) = two_steps(1)
    before, after = jax.device_get((before, after))
    mu, nu = moments(after)
    gradient = jax.tree.map(lambda m: m / np.float64(0.1), mu)

    def check(old, new, ema, g, second):
        np.testing.assert_allclose(second, 0.001 * g**2, rtol=1e-4, atol=1e-20)
        expected = old - 1e-3 * (g / (np.abs(g) + 1e-8) + 0.1 * old)
        np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-8)

    jax.tree.map(check, before.params, after.params, after.ema, gradient, nu)
    jax.tree.map(np.testing.assert_array_equal, before.params, before.ema)

    def norm(tree):
        return np.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))

    np.testing.assert_allclose(metrics["grad_norm"], norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], norm(after.params), rtol=1e-5)
    assert norm(gradient) > 0
    assert (before.step, after.step) == (0, 1)


def test_accumulated_step_equals_the_full_batch():
    """Four microbatches on eight devices give the step of the whole batch, whose random draws they share.

    Gradients are compared through the first moments: Adam's first update is their sign, which hides their size.
    """
    full_states, full_metrics = two_steps(1)
    states, metrics = two_steps(4)
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in full_metrics], rtol=1e-5)

    def check(a, b):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-9

    jax.tree.map(check, *jax.device_get((moments(states[1])[0], moments(full_states[1])[0])))
