"""SiT against the published facts: parameter counts, initialisation, position table, output layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.models import layers


def sit_config(size, variant="residual", **fields):
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(input_size=32, channels=4, num_classes=1000, patch_size=2, **config_lib.SIZES[size])
    config.model.update(**fields)
    return config.model


def shapes(model_config):
    model = models.build(model_config)
    x = jnp.zeros((1, model.input_size, model.input_size, model.channels))
    init = lambda: model.init(jax.random.key(0), x, jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})  # noqa: E731
    return nn.meta.unbox(jax.eval_shape(init)["params"])


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


PUBLISHED = {  # with the fixed position table: with and without learn_sigma
    "S": (32_963_360, 32_957_200),
    "B": (130_512_416, 130_500_112),
    "L": (458_102_816, 458_086_416),
    "XL": (675_129_632, 675_111_184),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    table = layers.position_table(16, config_lib.SIZES[size]["hidden_size"]).size
    counted = tuple(count(shapes(sit_config(size, learn_sigma=flag))) + table for flag in (True, False))
    assert counted == PUBLISHED[size]


def test_dynamic_xl_has_57_query_matrices():
    residual, dynamic = (shapes(sit_config("XL", variant)) for variant in ("residual", "dynamic"))
    d = 1152
    matrices = [
        leaf.size // d**2
        for path, leaf in jax.tree_util.tree_leaves_with_path(dynamic["stack"])
        if "query" in str(path) and "kernel" in str(path)
    ]
    assert sum(matrices) == 57
    assert count(dynamic) - count(residual) == 57 * (d**2 + d)  # the matrix and the norm's scale


def test_position_table_is_the_published_one():
    sums = {"S": 44720.338560, "B": 89660.316408, "L": 119619.457843, "XL": 134598.947804}
    for size, expected in sums.items():
        table = layers.position_table(16, config_lib.SIZES[size]["hidden_size"])
        np.testing.assert_allclose(table.astype(np.float64).sum(), expected, rtol=1e-7)
    table = layers.position_table(16, 384)
    np.testing.assert_allclose([table[1, 0], table[16, 0]], [0.841471, 0.0], atol=1e-6)


def test_initialisation_follows_the_official_bounds():
    """One block of XL width: Xavier on the fused qkv and the flattened patches, N(0, .02) embeddings, zeros."""
    config = sit_config("XL", "static_t")
    config.depth, config.routing.chunk_size = 2, 4
    model = models.build(config)
    params = jax.jit(model.init)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    )
    params = nn.meta.unbox(params["params"])
    block = params["stack"]["steps"]["block_1"]
    for kernel, bound in (
        (block["attention"]["qkv"]["kernel"], 0.036084),
        (params["patch"]["kernel"], 0.071673),
        (block["mlp"]["dense_0"]["kernel"], (6 / (5 * 1152)) ** 0.5),
    ):
        np.testing.assert_allclose(jnp.max(jnp.abs(kernel)), bound, rtol=2e-3)
    for normal in (params["label"]["table"], params["timestep"]["dense_0"]["kernel"]):
        np.testing.assert_allclose(jnp.std(normal), 0.02, rtol=2e-2)
    assert params["label"]["table"].shape == (1001, 1152)
    zero = [block["adaln"], params["head"], params["timestep"]["dense_1"]]
    zero += [params["stack"]["final_query"]["weight"], params["stack"]["steps"]["query_0"]["weight"]]
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(zero))


def tiny(variant="residual", **fields):
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(depth=2, hidden_size=16, num_heads=2, **fields)
    return models.build(config.model)


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.zeros((1, model.input_size, model.input_size, model.channels))
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), x, jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})
    )
    return jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), nn.meta.unbox(abstract)["params"]
    )


def test_prediction_has_the_shape_of_x_and_learn_sigma_keeps_the_first_half():
    model = tiny(channels=2, learn_sigma=True)
    params = random_params(model)
    x, t, y = (
        jax.random.normal(jax.random.key(1), (3, 8, 8, 2)),
        jnp.array([0.0, 0.5, 1.0]),
        {"label": jnp.array([0, 9, 10])},
    )
    out = jax.jit(model.apply)({"params": params}, x, t, y).prediction
    assert out.shape == x.shape and out.dtype == jnp.float32

    # The head's features are ordered (p, q, c): without the sigma columns the same prediction comes out.
    plain = dict(params, head=dict(params["head"]))
    keep = lambda a: a.reshape(*a.shape[:-1], 4, 4)[..., :2].reshape(*a.shape[:-1], 8)  # noqa: E731
    plain["head"]["dense"] = jax.tree.map(keep, params["head"]["dense"])
    np.testing.assert_allclose(
        jax.jit(tiny(channels=2).apply)({"params": plain}, x, t, y).prediction, out, rtol=1e-5, atol=1e-6
    )


def test_patches_round_trip_in_the_official_order():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = layers.patchify(jnp.asarray(x), 2)
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].reshape(-1))  # second row of 3 patches, second one
    square = x[:, :, :4]
    np.testing.assert_array_equal(layers.unpatchify(layers.patchify(jnp.asarray(square), 2), 2, 2), square)


def test_prediction_depends_on_the_label():
    model = tiny()
    params = random_params(model)
    x, t, y = jnp.ones((3, 8, 8, 1)), jnp.full(3, 0.5), {"label": jnp.array([3, model.num_classes, 3])}
    first, null, again = np.asarray(model.apply({"params": params}, x, t, y).prediction)
    assert np.linalg.norm(first - null) > 0.01 * np.linalg.norm(first)
    np.testing.assert_allclose(first, again, rtol=1e-6)


def test_bfloat16_model_keeps_float32_parameters_and_output():
    model = tiny("dynamic", dtype="bfloat16")
    reference = tiny("dynamic")
    params = random_params(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x, t, y = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.linspace(0, 1, 4), {"label": jnp.arange(4)}
    half, full = (jax.jit(m.apply)({"params": params}, x, t, y).prediction for m in (model, reference))
    assert half.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(half - full) / jnp.linalg.norm(full) < 0.05
