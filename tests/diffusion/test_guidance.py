import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dar_jax.conditions import Labels
from dar_jax.diffusion.guidance import guided

NUM_CLASSES = 7


def guide(y, predict=None, **options):
    condition = {"label": jnp.asarray(y)}
    return guided(predict or of_labels, condition, Labels(NUM_CLASSES).null(condition), **options)


def of_labels(x, t, condition):
    return predict(x, t, condition["label"])


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
    np.testing.assert_allclose(guide(y, scale=2.5)(x, t), expected, rtol=1e-5, atol=1e-5)


def test_official_three_channels():
    x, t, y = inputs()
    cond, expected = by_hand(x, t, y, 1.5)
    output = guide(y, scale=1.5, channels=3)(x, t)
    np.testing.assert_allclose(output[..., :3], expected[..., :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output[..., 3], cond[..., 3], rtol=1e-6)


def test_interval_acts_on_each_sample_by_its_own_time():
    x, t, y = inputs()
    cond, full = by_hand(x, t, y, 3.0)
    output = guide(y, scale=3.0, interval=(0.3, 0.8))(x, t)
    np.testing.assert_allclose(output[1], full[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output[::2], predict(*map(jnp.asarray, (x, t, y)))[::2])
    np.testing.assert_allclose(output[::2], cond[::2], rtol=1e-5, atol=1e-5)


def test_rescaled_tokens_have_the_norms_of_the_conditional_ones():
    """Qwen-Image: norms over the last axis of packed tokens, as its pipeline computes them."""
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(2, 2, 6, 4, 3))  # sample; conditional and null; 3 x 2 tokens of 2 x 2 x 3
    x, t, scale = jnp.zeros((2, 6, 4, 3)), jnp.array([0.2, 0.7]), 4.0

    def network(x, t, condition):
        return jnp.asarray(outputs.reshape(4, 6, 4, 3), jnp.float32)

    def packed(x):
        x = x.reshape(2, 3, 2, 2, 2, 3).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(2, 6, 12)

    v_pos, v_neg = packed(outputs[:, 0]), packed(outputs[:, 1])
    combined = v_neg + scale * (v_pos - v_neg)
    norms = [np.linalg.norm(v, axis=-1, keepdims=True) for v in (v_pos, combined)]
    found = guide(np.zeros(2, np.int32), network, scale=scale, rescaled_patch=2)(x, t)
    np.testing.assert_allclose(packed(np.asarray(found)), combined * norms[0] / norms[1], rtol=1e-5, atol=1e-6)
    at_rest = guide(np.zeros(2, np.int32), lambda x, t, condition: jnp.zeros_like(x), scale=scale, rescaled_patch=2)
    np.testing.assert_array_equal(at_rest(x, t), 0)


def test_scale_may_be_traced_and_one_is_the_conditional_output():
    x, t, y = inputs()
    run = jax.jit(lambda scale: guide(y, scale=scale)(x, t))
    np.testing.assert_allclose(run(2.0), by_hand(x, t, y, 2.0)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(1.0), predict(x, t, y), rtol=1e-6)
    np.testing.assert_allclose(run(0.0), predict(x, t, np.full(3, NUM_CLASSES)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale, rows", [(1.0, 3), (1, 3), (1.5, 6), (0.0, 6)])
def test_one_call_whose_batch_doubles_only_with_guidance(scale, rows):
    x, t, y = inputs()
    batches = []

    def counting(x, t, condition):
        assert x.shape[0] == t.shape[0] == condition["label"].shape[0]
        batches.append(x.shape[0])
        return of_labels(x, t, condition)

    guide(y, counting, scale=scale)(x, t)
    assert batches == [rows]


def test_sharded_batch_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.random.normal(jax.random.key(0), (16, 2, 2, 4))
    t, y = jnp.linspace(0, 1, 16), jnp.arange(16) % NUM_CLASSES
    run = jax.jit(lambda x, t, y: guide(y, scale=1.5, channels=3)(x, t))
    expected = run(x, t, y)
    with jax.set_mesh(mesh):
        args = jax.device_put((x, t, y), sharding)
        compiled = run.lower(*args).compile()
        output = compiled(*args)
    assert output.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


def test_condition_may_be_any_tree():
    x, t, _ = inputs()
    text = {"text": jnp.arange(12.0).reshape(3, 2, 2), "mask": jnp.array([[True, False], [True, True], [False, True]])}
    null = {"text": jnp.full((3, 2, 2), -1.0), "mask": jnp.ones((3, 2), bool)}

    def read(x, t, condition):
        summary = jnp.sum(condition["text"] * condition["mask"][..., None], axis=(1, 2))
        return x * summary.reshape(-1, 1, 1, 1)

    # Sums over the tokens kept: 0 + 1, 4 + 5 + 6 + 7, 10 + 11; of the null -4.
    cond, uncond = np.array([1.0, 22.0, 21.0]), -4.0
    expected = x * (uncond + 2.5 * (cond - uncond)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(guided(read, text, null, scale=2.5)(x, t), expected, rtol=1e-5)
