import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dar_jax.diffusion.guidance import guided
from dar_jax.errors import UserError

NUM_CLASSES = 7


def predict(x, t, y):
    return x * (1.0 + y.reshape(-1, 1, 1, 1)) + t.reshape(-1, 1, 1, 1)


def inputs():
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
    return x, np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 3, 6], np.int32)


def by_hand(x, t, y, scale):
    """uncond + scale (cond - uncond), sample by sample, in float64."""
    x, t = x.astype(np.float64), t.astype(np.float64)
    cond = np.stack([x[i] * (1 + y[i]) + t[i] for i in range(3)])
    uncond = np.stack([x[i] * (1 + NUM_CLASSES) + t[i] for i in range(3)])
    return cond, uncond + scale * (cond - uncond)


def test_all_channels():
    x, t, y = inputs()
    _, expected = by_hand(x, t, y, 2.5)
    np.testing.assert_allclose(guided(predict, y, NUM_CLASSES, scale=2.5)(x, t), expected, rtol=1e-5, atol=1e-5)


def test_official_three_channels():
    x, t, y = inputs()
    cond, expected = by_hand(x, t, y, 1.5)
    output = guided(predict, y, NUM_CLASSES, scale=1.5, channels=3)(x, t)
    np.testing.assert_allclose(output[..., :3], expected[..., :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output[..., 3], cond[..., 3], rtol=1e-6)


def test_interval_acts_on_each_sample_by_its_own_time():
    x, t, y = inputs()
    cond, full = by_hand(x, t, y, 3.0)
    output = guided(predict, y, NUM_CLASSES, scale=3.0, interval=(0.3, 0.8))(x, t)
    np.testing.assert_allclose(output[1], full[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output[::2], predict(*map(jnp.asarray, (x, t, y)))[::2])
    np.testing.assert_allclose(output[::2], cond[::2], rtol=1e-5, atol=1e-5)


def test_scale_may_be_traced_and_one_is_the_conditional_output():
    x, t, y = inputs()
    run = jax.jit(lambda scale: guided(predict, y, NUM_CLASSES, scale=scale)(x, t))
    np.testing.assert_allclose(run(2.0), by_hand(x, t, y, 2.0)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(1.0), predict(x, t, y), rtol=1e-6)
    np.testing.assert_allclose(run(0.0), predict(x, t, np.full(3, NUM_CLASSES)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale, rows", [(1.0, 3), (1, 3), (1.5, 6), (0.0, 6)])
def test_one_call_whose_batch_doubles_only_with_guidance(scale, rows):
    x, t, y = inputs()
    batches = []

    def counting(x, t, y):
        assert x.shape[0] == t.shape[0] == y.shape[0]
        batches.append(x.shape[0])
        return predict(x, t, y)

    guided(counting, y, NUM_CLASSES, scale=scale)(x, t)
    assert batches == [rows]


def test_sharded_batch_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.random.normal(jax.random.key(0), (16, 2, 2, 4))
    t, y = jnp.linspace(0, 1, 16), jnp.arange(16) % NUM_CLASSES
    run = jax.jit(lambda x, t, y: guided(predict, y, NUM_CLASSES, scale=1.5, channels=3)(x, t))
    expected = run(x, t, y)
    with jax.set_mesh(mesh):
        args = jax.device_put((x, t, y), sharding)
        compiled = run.lower(*args).compile()
        output = compiled(*args)
    assert output.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


def test_bad_values_are_user_errors():
    x, t, y = inputs()
    with pytest.raises(UserError, match="cfg_interval"):
        guided(predict, y, NUM_CLASSES, scale=2.0, interval=(0.8, 0.2))
    with pytest.raises(UserError, match="cfg_channels = -1"):
        guided(predict, y, NUM_CLASSES, scale=2.0, channels=-1)
    with pytest.raises(UserError, match="cfg_channels = 5 must be at most 4"):
        guided(predict, y, NUM_CLASSES, scale=2.0, channels=5)(x, t)
