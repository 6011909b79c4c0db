"""The train step: one update by hand, gradient accumulation, and the same losses on every mesh."""

import functools

import jax
import numpy as np
import pytest

from tests.training import tiny

MESHES = [(1, 1), (8, 1), (4, 2), (2, 4)]


@functools.cache
def losses(data, fsdp):
    return np.array([m["loss"] for m in tiny.run(tiny.make_config(), tiny.make_mesh(data, fsdp), 20)[1]])


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_losses_do_not_depend_on_the_mesh(shape):
    """Twenty steps, with label dropout, within 1e-5 relative of one device."""
    assert losses(1, 1)[19] < losses(1, 1)[0]
    np.testing.assert_allclose(losses(*shape), losses(1, 1), rtol=1e-5)


def moments(state):
    """The AdamW moments in optax's state."""
    (found,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return found.mu, found.nu


def test_one_update_equals_numpy():
    """From the gradient that the first moment shows: second moment, weights, EMA, norms and the step count."""
    config = tiny.make_config()
    config.optimizer.weight_decay = 0.1
    (before, after), (metrics,) = tiny.run(config, tiny.make_mesh(1, 1), 1)
    before, after = jax.device_get((before, after))
    mu, nu = moments(after)
    gradient = jax.tree.map(lambda m: m / np.float64(0.1), mu)

    def check(old, new, ema, g, second):
        np.testing.assert_allclose(second, 0.001 * g**2, rtol=1e-4, atol=1e-20)
        expected = old - 0.01 * (g / (np.abs(g) + 1e-8) + 0.1 * old)
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
    """Without label dropout (its draws differ) four microbatches on eight devices give the step of the whole batch.

    Gradients are compared through the first moments: Adam's first update is their sign, which hides their size.
    """
    config = tiny.make_config()
    config.model.label_dropout = 0.0
    config.train.batch_size = 32
    mesh = tiny.make_mesh(4, 2)
    full_states, full_metrics = tiny.run(config, mesh, 2)
    config.train.accumulate_steps = 4
    states, metrics = tiny.run(config, mesh, 2)
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in full_metrics], rtol=1e-5)

    def check(a, b):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-9

    jax.tree.map(check, *jax.device_get((moments(states[1])[0], moments(full_states[1])[0])))


def test_state_is_sharded_over_fsdp():
    """Before and after a step each device of a (2, 4) mesh holds a quarter of all large arrays, EMA and moments too."""
    (before, after), _ = tiny.run(tiny.make_config(), tiny.make_mesh(2, 4), 1)
    for state in (before, after):
        for tree in (state.params, state.ema, *moments(state)):
            kernels = [x for x in jax.tree.leaves(tree) if x.ndim >= 2]
            assert len(kernels) > 8
            for x in kernels:
                assert x.addressable_shards[0].data.size * 4 == x.size, x.shape
