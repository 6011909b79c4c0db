"""The fused stack against plain autodiff, with a query of its own too; forward-mode derivatives of a whole model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.diagnosis.forward import forward
from dar_jax.routing import QUERIES, Query


class TimedDynamic(Query):
    """q = W v + e(t): a query that package code has never heard of."""

    reads_newest = True
    adds_time = True

    @nn.compact
    def __call__(self, time_embedding, newest):
        size = newest.shape[-1]
        kernel = self.param("kernel", nn.initializers.zeros, (size, size))
        return (newest @ kernel + time_embedding[:, None]) * self.scale(size)


ALL_QUERIES = {**QUERIES, "timed_dynamic": TimedDynamic}


def make(query, plain, monkeypatch, depth=4, **routing):
    """A SiT in float64 with random parameters everywhere, and inputs for it."""
    monkeypatch.setitem(QUERIES, "timed_dynamic", TimedDynamic)
    config = config_lib.route(config_lib.default(), "residual" if query == "residual" else "static")
    config.model.update(patch_size=4, depth=depth, hidden_size=8, num_heads=2, remat="block", dtype="float64")
    config.model.routing.update(routing, **({} if query == "residual" else {"query": query}))
    model = models.build(config.model, plain=plain)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(3, 8, 8, 1))), jnp.array([0.1, 0.5, 0.8]), {"label": jnp.array([0, 3, 10])}
    abstract = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4), abstract)
    return model, params, inputs


CASES = [  # query, structure, remat, hidden_at: at the start of a chunk, within one, or both
    ("residual", {}, "dense", (2, 1)),
    pytest.param("static", {"chunk_size": 1}, "dense", (3,), marks=pytest.mark.slow),
    ("static", {"chunk_size": 2, "summary": "sum", "final": "summaries"}, "block", ()),
    pytest.param("static_t", {"chunk_size": 2, "summary": "sum"}, "dense", (1,), marks=pytest.mark.slow),
    ("static_t", {"chunk_size": 4, "final": "shared"}, "block", (1,)),
    pytest.param("dynamic", {"chunk_size": 1, "final": "shared"}, "block", (2,), marks=pytest.mark.slow),
    ("dynamic", {"chunk_size": 4, "summary": "sum"}, "dense", (3, 2)),
    pytest.param("timed_dynamic", {"chunk_size": 1, "final": "summaries"}, "dense", (1,), marks=pytest.mark.slow),
    ("timed_dynamic", {"chunk_size": 2}, "block", ()),
    ("static", {"kind": "delta", "chunk_size": 4, "summary": "sum"}, "dense", (3, 2)),
    ("static_t", {"kind": "delta", "chunk_size": 1, "final": "shared"}, "block", (1,)),
    ("dynamic", {"kind": "delta", "chunk_size": 2, "summary": "sum", "final": "summaries"}, "dense", (1,)),
    pytest.param("dynamic", {"kind": "delta", "chunk_size": 1}, "block", (2,), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("query", "structure", "remat", "hidden_at"), CASES, ids=str)
def test_fused_equals_plain(query, structure, remat, hidden_at, monkeypatch):
    """Prediction and hidden state, and gradients of all parameters and of x_t and t."""
    with jax.enable_x64(True):
        plain, params, inputs = make(query, True, monkeypatch, **structure)
        fused = make(query, False, monkeypatch, **structure)[0].clone(remat=remat)
        probe = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape))

        def loss(model, params, x_t, t):
            output = model.apply({"params": params}, x_t, t, inputs[2], hidden_at=hidden_at)
            extra = sum(jnp.sum(jnp.sin(hidden)) for hidden in output.hidden)
            return jnp.sum(output.prediction * probe) + extra, output

        def gradients(model):
            return jax.jit(jax.grad(functools.partial(loss, model), (0, 1, 2), has_aux=True))(params, *inputs[:2])

        found, expected = gradients(fused), gradients(plain)
        states = jax.jit(functools.partial(forward, plain))(params, *inputs)[1].states
    assert len(found[1].hidden) == len(hidden_at)
    for k, hidden in zip(hidden_at, found[1].hidden, strict=True):
        np.testing.assert_allclose(hidden, states[2 * k], rtol=1e-10, atol=1e-12)
    whole = np.sqrt(sum(np.sum(np.square(b)) for b in jax.tree.leaves(expected)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # With one source a query has no effect: its gradient is zero, up to rounding of terms that are not.
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * whole)
        assert error < 1e-10, f"{jax.tree_util.keystr(path)}: {error:.1e}"
    queries = {k: v for k, v in expected[0][0]["stack"]["steps"].items() if k.startswith("query")}
    assert all(np.any(g) for k, v in queries.items() if k != "query_0" for g in jax.tree.leaves(v))


@pytest.mark.parametrize("query", ["residual", *ALL_QUERIES])
def test_forward_mode_agrees_with_central_differences(query, monkeypatch):
    """In x_t, t and all parameters at once; then the gradient of a loss on that derivative, as MeanFlow needs it."""
    with jax.enable_x64(True):
        model, params, (x_t, t, condition) = make(query, True, monkeypatch, depth=2, chunk_size=2)
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape)), (params, x_t, t))

        def predict(params, x_t, t):
            return model.apply({"params": params}, x_t, t, condition).prediction

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(primals):
            prediction, tangent = jax.jvp(predict, primals, direction)
            return jnp.sum(jnp.cos(jnp.arange(tangent.size)) * tangent.ravel()), (prediction, tangent)

        def at(step):
            return loss(jax.tree.map(lambda a, d: a + step * d, (params, x_t, t), direction))

        step = 1e-6
        (_, (_, tangent)), gradient = at(0)
        (high, (above, _)), _ = at(step)
        (low, (below, _)), _ = at(-step)
        difference = (above - below) / (2 * step)
        error = np.linalg.norm(tangent - difference) / np.linalg.norm(difference)
        assert error < 1e-6
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        assert slope == pytest.approx(float(high - low) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("query", ["residual", *QUERIES])
def test_plain_and_fused_models_start_from_the_same_parameters(query, monkeypatch):
    made = []
    for plain in (True, False):
        model, _, inputs = make(query, plain, monkeypatch, depth=2, chunk_size=4)
        made.append(model.init(jax.random.key(3), *inputs)["params"])
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.parametrize(("variant", "remat"), [("residual", "dense"), ("residual", "block"), ("static_t", "block")])
def test_hidden_states_take_no_memory_of_other_blocks(variant, remat):
    """The gradient of a loss on two of eight states needs room for a few states more, not for eight."""
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(patch_size=1, depth=8, hidden_size=32, num_heads=2, remat=remat)
    model = models.build(config.model)
    inputs = jnp.zeros((32, 8, 8, 1)), jnp.zeros(32), {"label": jnp.zeros(32, jnp.int32)}
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])

    def temporaries(hidden_at):
        def loss(params):
            output = model.apply({"params": params}, *inputs, hidden_at=hidden_at)
            return jnp.sum(output.prediction) + sum(jnp.sum(jnp.sin(hidden)) for hidden in output.hidden)

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    state = 4 * 32 * 64 * 32
    assert temporaries((3, 5)) - temporaries(()) < 4.5 * state
