"""Rivals of DAR against unrolled PyTorch, their published sizes, and that they begin as the residual model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.diagnosis.forward import forward
from dar_jax.errors import UserError
from dar_jax.models.check import check
from dar_jax.models.layers import Block
from dar_jax.models.numerics import Arithmetic
from dar_jax.models.plain_stack import PlainRoutedStack
from dar_jax.models.rivals import Rival, sinkhorn
from dar_jax.routing import QUERIES, Layout
from tests.models.test_stack import (
    HEADS,
    SIZE,
    assert_close,
    check_stack,
    make,
    routed,
    value_and_gradients,
)
from tests.parity import torch_stack

DEPTH = 4


def stack_of(kind, lanes, remat):
    block = functools.partial(Block, SIZE, HEADS, 2.0, Arithmetic(jnp.float64))
    return Rival(kind, lanes).stack(block, DEPTH, remat)


@pytest.mark.parametrize(
    ("kind", "lanes", "remat"),
    [("long_skip", 2, "block"), ("hyper", 2, "dense"), ("hyper", 3, "block"), ("identity_hyper", 2, "block"),
     ("mhc", 4, "dense"), ("dense_former", 2, "block")],
)  # fmt: skip
def test_stacks_equal_unrolled_references(kind, lanes, remat):
    """Values and gradients in float64, with random parameters everywhere."""

    def reference(params, v_0, condition, e_t, shift, scale):
        if kind == "long_skip":
            read, _ = torch_stack.long_skip_stack(params, DEPTH, HEADS, v_0, condition)
        elif kind == "dense_former":
            read, _ = torch_stack.dense_former_stack(params, DEPTH, HEADS, v_0, condition)
        else:
            read, _ = torch_stack.hyper_stack(params, DEPTH, HEADS, lanes, kind, v_0, condition)
        return torch_stack.modulated_norm(read, shift, scale)

    check_stack(stack_of(kind, lanes, remat), reference, jnp.float64)


@pytest.mark.parametrize("kind", ["long_skip", "mhc", "dense_former"])
def test_hidden_states_are_the_streams_after_blocks(kind):
    stack = stack_of(kind, 2, "block")
    with jax.enable_x64(True):
        params, inputs = make(stack, jnp.float64)
        _, hidden = stack.apply({"params": params}, *inputs, (3, 1))
        as_torch = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), (params, *inputs[:2]))
        if kind == "long_skip":
            _, wanted = torch_stack.long_skip_stack(as_torch[0], DEPTH, HEADS, *as_torch[1:])
        elif kind == "dense_former":
            _, wanted = torch_stack.dense_former_stack(as_torch[0], DEPTH, HEADS, *as_torch[1:])
        else:
            _, wanted = torch_stack.hyper_stack(as_torch[0], DEPTH, HEADS, 2, kind, *as_torch[1:])
    for state, k in zip(hidden, (3, 1), strict=True):
        np.testing.assert_allclose(state, wanted[k - 1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("chunk_size", "query"), [(1, "static"), (4, "dynamic"), (2, "static_t")])
def test_delta_equals_the_stream_and_a_correction(chunk_size, query):
    """Values and gradients in float64, with gates that are not zero."""
    layout = Layout(DEPTH, chunk_size, "sum", is_additive=True)
    block = functools.partial(Block, SIZE, HEADS, 2.0, Arithmetic(jnp.float64))
    stack = PlainRoutedStack(block, layout, QUERIES[query], None)

    def reference(params, v_0, condition, e_t, shift, scale):
        read = torch_stack.delta_stack(params, layout, query, HEADS, v_0, condition, e_t)
        return torch_stack.modulated_norm(read, shift, scale)

    check_stack(stack, reference, jnp.float64)


@pytest.mark.parametrize("final", ["dedicated", "shared", "summaries"])
def test_a_shared_query_is_a_static_one_that_is_the_same_everywhere(final):
    """In the fused stack and the plain one; its gradient is the sum of those of all readers."""
    layout = Layout(DEPTH, 2, "sum", final)
    with jax.enable_x64(True):
        shared, static = routed(layout, "shared", jnp.float64), routed(layout, "static", jnp.float64)
        params, inputs = make(shared, jnp.float64)
        assert sum(x.size for x in jax.tree.leaves(params["shared_query"])) == 2 * SIZE
        own, steps = params["shared_query"], params["steps"]
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (layout.num_steps, SIZE)), own)
        params_of_static = {"steps": {**steps, "query_0": repeated, "query_1": repeated}}
        params_of_static |= {"final_query": own} if layout.final_set.has_query else {}
        probe = np.random.default_rng(7).normal(size=inputs[0].shape)
        actual = value_and_gradients(shared, params, inputs, probe)
        wanted = value_and_gradients(static, params_of_static, inputs, probe)
        np.testing.assert_allclose(actual["h"], wanted["h"], rtol=1e-12)
        of_readers = wanted["gradients"][0]
        for name, gradient in actual["gradients"][0]["shared_query"].items():
            total = sum(of_readers["steps"][f"query_{j}"][name].sum(0) for j in (0, 1))
            total += of_readers["final_query"][name] if layout.final_set.has_query else 0
            np.testing.assert_allclose(gradient, total, rtol=1e-9)
        block = functools.partial(Block, SIZE, HEADS, 2.0, Arithmetic(jnp.float64))
        plain = PlainRoutedStack(block, layout, QUERIES["shared"], None)
        assert_close(value_and_gradients(plain, params, inputs, probe), actual, 1e-10)


def make_model(variant, **fields):
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(fields)
    config.model.routing.chunk_size = 2
    return models.build(config.model)


def random_weights(model):
    """Weights that are nowhere zero, and inputs."""
    rng = np.random.default_rng(0)
    x_t = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
    inputs = x_t, jnp.array([0.2, 0.7]), {"label": jnp.array([1, 2])}
    fresh = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), fresh), inputs


def count(variant, lanes=4):
    """Parameters of an XL/2 beside those of a residual one."""
    counts = []
    for kind in (variant, "residual"):
        model = make_model(kind, **config_lib.SIZES["XL"], input_size=32, channels=4, patch_size=2)
        model = model.clone(rival=model.rival and model.rival._replace(lanes=lanes))
        inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
        counts.append(sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs))))
    return counts[0] - counts[1]


def test_published_numbers_of_parameters():
    """Of 28 blocks and 1152 features: 448, 37.18M, and 6.19M + .26M."""
    assert count("hyper", 2) == 448 and count("hyper", 4) == 1344
    assert count("long_skip") == 14 * (2 * 1152**2 + 1152)
    assert count("dense_former") == 434 and count("shared") == 2 * 1152
    assert count("mhc") == 56 * (4 * 1152 * 24 + 4 * 1152 + 24 + 3)
    assert count("identity_hyper") == 56 * (4 * 1152 * 8 + 4 * 1152 + 8 + 2)


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [("hyper", 1e-5), ("identity_hyper", 0.05), ("mhc", 0.05), ("dense_former", 1e-5), ("delta", 1e-5)],
)
def test_fresh_rivals_begin_as_the_residual_model(variant, tolerance):
    """With weights of blocks that are not zero; those of tokens nearly so, because their gain is 0.01."""
    fresh, residual = (make_model(v, depth=2, hidden_size=16, num_heads=2) for v in (variant, "residual"))
    params, inputs = random_weights(residual)
    own = nn.meta.unbox(fresh.init(jax.random.key(0), *inputs)["params"])
    own = {**params, "stack": {**own["stack"], "steps": {**own["stack"]["steps"], **params["stack"]["steps"]}}}
    wanted = residual.apply({"params": params}, *inputs).prediction
    error = jnp.linalg.norm(fresh.apply({"params": own}, *inputs).prediction - wanted) / jnp.linalg.norm(wanted)
    assert error < tolerance


@pytest.mark.parametrize("variant", ["long_skip", "hyper", "dense_former"])
def test_the_diagnosis_sees_what_is_read(variant):
    """The prediction is the model's, and the first reader reads v_0, the first output."""
    model = make_model(variant, depth=2, hidden_size=16, num_heads=2)
    params, inputs = random_weights(model)
    taps = jnp.zeros((5, 2, 16, 16))
    prediction, reads = forward(model, params, *inputs)
    slopes = jax.grad(lambda taps: jnp.sum(forward(model, params, *inputs, taps)[0] ** 2))(taps)
    np.testing.assert_allclose(prediction, model.apply({"params": params}, *inputs).prediction, rtol=1e-4, atol=1e-4)
    assert reads.states.shape == reads.outputs.shape == taps.shape and reads.weights is None
    first = reads.outputs[0] * (params["stack"]["read"][0, 0].sum() if variant == "hyper" else 1)
    np.testing.assert_allclose(reads.states[0], first, rtol=1e-5, atol=1e-5)
    assert all(np.any(slope) for slope in slopes)


def test_sinkhorn_ends_doubly_stochastic():
    mix = sinkhorn(jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4)), jnp.float32))
    np.testing.assert_allclose(mix.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(mix.sum(-2), 1, atol=1e-5)


def test_uniform_queries_stay_zero():
    """A static query of the same parameters, not zero, is something else."""
    e_t, newest = jnp.ones((2, 8)), jnp.ones((2, 3, 8))
    params = {"params": {"weight": jnp.ones(8), "scale": jnp.ones(8)}}
    queries = [QUERIES[name]().apply(params, e_t, newest) for name in ("uniform", "static")]
    assert not np.any(queries[0]) and np.all(queries[1]) and queries[0].shape == queries[1].shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 5}, "config.model.depth = 5 must be even"),
        ({"family": "mmdit"}, "long_skip is of config.model.family"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    config = config_lib.route(config_lib.default(), "long_skip")
    config.model.update(fields)
    with pytest.raises(UserError, match=message):
        check(config.model)
