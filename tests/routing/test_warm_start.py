"""Warm start: a residual model's weights in a routed model compute the same, and then routing learns."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import conditions, diffusion, models, objectives, sharding
from dar_jax import config as config_lib
from dar_jax.checkpoint import restore_ema
from dar_jax.data.pipeline import train_iterator
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import make_sampler
from dar_jax.init_from import check_init_from, restore_initial
from dar_jax.routing import QUERIES, Layout
from dar_jax.routing.warm_start import keeps_function, warm_start
from dar_jax.training.loop import train
from tests.training.tiny import abstract as tiny_abstract


def tiny(variant, **routing):
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(depth=4, hidden_size=16, num_heads=2)
    config.model.routing.update(routing)
    return config


def abstract(model):
    x = jnp.zeros((1, model.input_size, model.input_size, model.channels))
    init = lambda: model.init(jax.random.key(0), x, jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})  # noqa: E731
    return nn.meta.unbox(jax.eval_shape(init))["params"]


def residual_params():
    """Random everywhere: e(t), gates and head are far from their initial zeros."""
    rng = np.random.default_rng(0)
    shapes = abstract(models.build(tiny("residual").model))
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


X = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
T, Y = jnp.array([0.0, 0.3, 0.7, 1.0]), {"label": jnp.array([0, 3, 9, 10])}


@functools.cache
def residual_output():
    return jax.jit(models.build(tiny("residual").model).apply)({"params": residual_params()}, X, T, Y).prediction


def relative_error(config):
    """Between the residual model and the warm-started one."""
    params = residual_params()
    routed = models.build(config.model)
    warm = warm_start(params, routed.layout, routed.query)
    assert jax.tree.map(jnp.shape, warm) == jax.tree.map(jnp.shape, abstract(routed))
    expected = residual_output()
    difference = jax.jit(routed.apply)({"params": warm}, X, T, Y).prediction - expected
    error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))
    print(f"relative error {error:.1e}")
    return error


EXACT = [
    ("static", {"chunk_size": 1}),
    ("static_t", {"chunk_size": 1}),
    ("dynamic", {"chunk_size": 1, "final": "summaries"}),
    ("static_t", {"chunk_size": 4, "summary": "sum"}),
    ("dynamic", {"chunk_size": 2, "summary": "sum", "final": "shared"}),
    ("static", {"chunk_size": 4, "summary": "sum", "final": "summaries"}),
    ("static_t", {"chunk_size": 8}),  # one chunk: no summary of an unfinished history
    ("delta", {"chunk_size": 4}),
    ("delta", {"chunk_size": 1, "query": "dynamic", "final": "shared"}),
]
INEXACT = [("static", {"chunk_size": 4}), ("dynamic", {"chunk_size": 8, "final": "summaries"})]


@pytest.mark.parametrize(("variant", "routing"), EXACT, ids=str)
def test_function_is_kept(variant, routing):
    config = tiny(variant, **routing)
    assert keeps_function(models.build(config.model).layout)
    assert relative_error(config) < 1e-4


@pytest.mark.parametrize(("variant", "routing"), INEXACT, ids=str)
def test_function_is_not_kept_and_it_is_known(variant, routing):
    config = tiny(variant, **routing)
    assert not keeps_function(models.build(config.model).layout)
    assert relative_error(config) > 1e-2


@pytest.mark.parametrize("query", ["static", "static_t", "dynamic"])
def test_routing_can_leave_the_warm_start(query):
    """Every aggregator's folded query has a gradient and moves; all of its parameters do after two steps."""
    config = tiny(query, chunk_size=1)
    model = models.build(config.model)
    params = warm_start(residual_params(), model.layout, model.query)
    probe = jax.random.normal(jax.random.key(2), X.shape)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(probe * model.apply({"params": p}, X, T, Y).prediction)))
    start, moving = params, {"static": "weight", "static_t": "scale", "dynamic": "kernel"}[query]
    for step in range(2):
        gradients = gradient(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients["stack"]):
            if step == 0 and "query" in str(path) and moving in str(path):
                rows = np.abs(np.asarray(leaf)).reshape(model.layout.num_steps if leaf.ndim > 1 else 1, -1).max(1)
                # The first aggregator has one source, which it takes whatever the query is.
                alone = "query_0" in str(path)
                assert np.all(rows[alone:] > 1e-6), f"{path}: {rows}"
        params = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, gradients)  # as Adam begins
    queries = lambda tree: {k: v for k, v in tree["stack"]["steps"].items() if k.startswith("query_")}  # noqa: E731
    for before, after in zip(jax.tree.leaves(queries(start)), jax.tree.leaves(queries(params)), strict=True):
        assert np.all(np.isfinite(after)) and np.any(before[1:] != after[1:])


def test_a_correction_can_leave_the_mean():
    """In a warm-started delta all queries that read several sources have gradients, and after a step all gates."""
    model = models.build(tiny("delta", chunk_size=4).model)
    params = warm_start(residual_params(), model.layout, model.query)
    fresh = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), X, T, Y)["params"]["stack"])
    for name in ("gate_0", "gate_3"):
        np.testing.assert_array_equal(fresh["steps"][name], params["stack"]["steps"][name])
    assert fresh["final_gate"] == params["stack"]["final_gate"]
    probe = jax.random.normal(jax.random.key(2), X.shape)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(probe * model.apply({"params": p}, X, T, Y).prediction)))

    def of_readers(tree, name):
        leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree["stack"]) if name(str(path))]
        return np.concatenate(
            [np.abs(leaf).reshape(len(leaf) if leaf.ndim == 2 else leaf.size, -1).max(1) for leaf in leaves]
        )

    gradients = gradient(params)
    queries = of_readers(gradients, lambda path: "query_" in path and "weight" in path)
    assert np.sum(queries > 1e-2) == len(queries) - 1  # the first reader has one source, which it takes anyway
    moved = gradient(jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, gradients))
    assert np.sum(of_readers(moved, lambda path: "gate" in path) > 5e-5) == len(queries)


def digits(variant, steps, **routing):
    config = tiny(variant, **routing)
    config.model.depth = 2
    config.optimizer.learning_rate = 3e-3
    config.optimizer.ema_decay = 0.9
    config.train.update(num_steps=steps, batch_size=16, log_every_steps=1)
    config.sampler.update(method="euler", num_steps=2)
    return config


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def samples(params, config, mesh):
    draw = make_sampler(config, objectives.build(config).sample, mesh)
    index = jax.device_put(jnp.arange(8, dtype=jnp.int32), sharding.batch_sharding(mesh))
    return np.asarray(draw(params, index, {"label": index}))


def first_loss(config, params):
    """The loss of the first step on the first batch, written out."""
    pipeline = {"space": "pixels", "channels": 1, "batch_size": config.train.batch_size, "seed": config.seed}
    batch = next(train_iterator(config.data, **pipeline))
    draw_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    x1 = batch["x1"]
    t, x0 = diffusion.build(config.diffusion).draw(draw_key, x1)
    condition = conditions.build(config.model).drop(label_key, batch["condition"])
    x_t = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
    velocity = jax.jit(models.build(config.model).apply)({"params": params}, x_t, t, condition).prediction
    return float(jnp.mean((velocity - (x1 - x0)) ** 2))


def test_main_starts_from_a_trained_checkpoint(tmp_path, capsys):
    """The first loss and the samples of the warm-started run are those of the residual weights it starts from."""
    source, residual = tmp_path / "residual", digits("residual", 20)
    train(residual, str(source))
    dense = digits("static_t", 4, chunk_size=1)
    dense.init_from = str(source)
    train(dense, str(tmp_path / "dense_from"))
    said = capsys.readouterr().out
    assert f"started from the EMA weights of step 20 of {source}" in said and "warning" not in said

    mesh = sharding.make_mesh(dense.mesh)
    with sharding.use(mesh):
        ema, _ = restore_ema(str(source), tiny_abstract(residual, mesh))
        expected, curve = first_loss(residual, ema), losses(tmp_path / "dense_from")
        assert abs(curve[0] - expected) < 1e-4 * expected and np.all(np.isfinite(curve))
        assert expected < 0.95 * losses(source)[0]  # the same batch in a random start

        drawn = samples(ema, residual, mesh)
        error = np.abs(samples(warm_start(ema, Layout(2, 1), QUERIES["static_t"]), dense, mesh) - drawn).max()
        assert error < 1e-4
        trained, step = restore_ema(str(tmp_path / "dense_from"), tiny_abstract(dense, mesh))
        assert step == 4
        assert np.any(np.asarray(trained["stack"]["steps"]["query_1"]["scale"]))  # routing has left the uniform start

        last = digits("static", 1, chunk_size=2)
        last.init_from = str(source)
        restore_initial(last, tiny_abstract(last, mesh), mesh)
        assert "warning: these are residual weights, and chunks of 2 summarised" in capsys.readouterr().out

    dense.init_from = str(tmp_path / "nowhere")  # a run that resumes asks for it no more
    train(dense, str(tmp_path / "dense_from"))
    assert "nothing to do" in capsys.readouterr().out

    def refused(config, path, message):
        config.init_from = str(tmp_path / path)
        with pytest.raises(UserError, match=message):
            check_init_from(config)

    refused(dense, "nowhere", "has no config.json")
    refused(digits("residual", 1), "dense_from", "routing.kind = dar, not residual")
    refused(digits("static", 1, chunk_size=1), "dense_from", "routing.query = static_t, not static")
    refused(digits("static_t", 1, chunk_size=2), "dense_from", "routing.chunk_size = 1, not 2")
    wide = digits("dynamic", 1)
    wide.model.hidden_size = 32
    refused(wide, "residual", "model.hidden_size = 16, not 32")
    gvp = digits("dynamic", 1)
    gvp.diffusion.interpolant = "gvp"
    refused(gvp, "residual", "diffusion.interpolant = linear, not gvp")
    gvp.diffusion.interpolant, gvp.model.label_dropout = "linear", 0.0
    assert check_init_from(gvp).model.routing.kind == "residual"
    with pytest.raises(UserError, match="hidden_size"):  # and before anything is written
        train(wide, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
