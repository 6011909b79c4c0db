"""Representation alignment: the whole loss against PyTorch, its targets, its end, and what becomes of the projector."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dar_jax import config as config_lib
from dar_jax import models, objectives, sharding
from dar_jax.errors import UserError
from dar_jax.models.layers import position_table
from dar_jax.objectives import repa
from dar_jax.objectives.hog import BINS, hog
from dar_jax.validate import validate
from tests.parity import torch_repa
from tests.training import tiny


def make_config(variant="static_t", routing=(), **settings):
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(patch_size=2, depth=4, hidden_size=8, num_heads=2)
    config.model.routing.update(dict(routing))
    config.repa.update({"block": 2, "later_block": 3, "target": "hog", **settings})
    return config


CASES = {  # variant, routing, repa: blocks at the start of a chunk, where 2 * block is a multiple of its size, or not
    "residual": ("residual", {}, {"block": 1}),
    "residual_later": ("residual", {}, {"target": "later_block", "block": 2, "later_block": 3}),
    "static_dense": ("static", {"chunk_size": 1}, {"block": 3, "projector": "conv"}),
    "static_chunk_start": ("static", {"final": "shared"}, {"block": 2, "standardize": True}),
    "static_t_within": ("static_t", {"final": "shared"}, {"block": 1, "projector": "conv", "coefficient": 1.5}),
    "static_t_later": ("static_t", {}, {"target": "later_block", "block": 1, "later_block": 2}),
    "static_t_x1": ("static_t", {"chunk_size": 1}, {"target": "latents", "standardize": True, "mean_share": 0.25}),
    "dynamic_within": ("dynamic", {"summary": "sum"}, {"block": 3}),
    "dynamic_dense": ("dynamic", {"chunk_size": 1, "final": "shared"}, {"block": 1, "target": "latents"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_pytorch(case):
    variant, routing, settings = CASES[case]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        config = make_config(variant, routing, **settings)
        config.model.dtype = "float64"
        objective = objectives.build(config)
        abstract = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4 / len(p) ** 0.25), abstract)
        batch = {"x1": jnp.asarray(rng.uniform(-1, 1, (3, 8, 8, 1))), "condition": {"label": jnp.array([1, 3, 9])}}
        drawn = objective.draw(jax.random.key(1), jnp.int32(0), (), batch)
        drawn = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, drawn)
        drawn["condition"] = {"label": jnp.array([1, 10, 9])}
        frequencies = jax.jit(lambda: jnp.exp(-jnp.log(10000.0) * jnp.arange(128, dtype=jnp.float32) / 128))()
        (value, metrics), gradients = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(params, drawn)

    to_torch = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    leaves = jax.tree.map(lambda p: to_torch(p).requires_grad_(), params)
    inputs = {name: to_torch(drawn[name]) for name in ("x1", "x0", "t")}
    inputs["constants"] = {"frequencies": to_torch(frequencies), "positions": to_torch(position_table(4, 8))}
    inputs["label"] = to_torch(drawn["condition"]["label"]).long()
    target = to_torch(drawn["repa"]["target"]).double() if "target" in drawn["repa"] else None
    expected, flow, error = torch_repa.loss(leaves, config, models.build(config.model).layout, inputs, target)
    expected.backward()
    for found, wanted in ((value, expected), (metrics["loss_flow"], flow), (metrics["loss_repa"], error)):
        assert found == pytest.approx(wanted.item(), rel=1e-10)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(leaves), strict=True):
        b = np.zeros(b.shape) if b.grad is None else b.grad.numpy()
        assert np.linalg.norm(a - b) <= 1e-9 * max(np.linalg.norm(b), 1e-3), jax.tree_util.keystr(path)


def test_projectors_have_the_published_sizes():
    config = config_lib.route(config_lib.default(), "residual")
    config.model.update(**config_lib.SIZES["XL"], input_size=32, channels=4, space="latents")
    config.repa.target = "encoder"
    model = models.build(config.model)
    for projector, count in (("mlp", 8_131_328), ("conv", 7_963_392)):
        config.repa.projector = projector
        shapes = jax.eval_shape(repa.build(config, model).init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes))) == count


def test_hog_equals_loops():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    images[1, :, 6:] = 0.5  # a flat half
    found = np.asarray(jax.jit(hog, static_argnums=1)(jnp.asarray(images), 4)).reshape(2, 4, 4, 9, BINS)
    for b in range(2):
        luma = images[b] @ np.array([0.299, 0.587, 0.114])
        cells = np.zeros((6, 6, BINS))  # with a margin of zeros
        for i in range(12):
            for j in range(12):
                down = luma[i + 1, j] - luma[i - 1, j] if 0 < i < 11 else 0.0
                right = luma[i, j + 1] - luma[i, j - 1] if 0 < j < 11 else 0.0
                degrees = np.degrees(np.arctan2(down, right)) % 180
                for k in range(BINS):
                    away = abs(degrees - (10 + 20 * k))
                    share = max(0, 1 - min(away, 180 - away) / 20)
                    cells[i // 3 + 1, j // 3 + 1, k] += share * np.hypot(down, right) / 9
        for i in range(4):
            for j in range(4):
                around = cells[i : i + 3, j : j + 3].reshape(9, BINS)
                np.testing.assert_allclose(
                    found[b, i, j], around / np.sqrt(np.sum(around**2) + 1e-6), rtol=1e-4, atol=1e-5
                )


def test_the_target_of_a_flipped_image_is_the_flipped_one():
    """Orientations turn around, cells change sides: the features move, and their sum by cell and neighbour stays."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 1)), jnp.float32)
    once = hog(images, 4).reshape(4, 4, 3, 3, BINS)
    flipped = hog(images[:, :, ::-1], 4).reshape(4, 4, 3, 3, BINS)
    np.testing.assert_allclose(flipped[:, ::-1, :, ::-1, ::-1], once, rtol=1e-4, atol=1e-5)


def make_small(**settings):
    """A run that compiles fast."""
    config = tiny.make_config()
    config.model.routing.kind = "residual"
    config.model.depth = 3
    config.repa.update({"target": "hog", "block": 1, "later_block": 2, **settings})
    return config


def train(config, steps, mesh_shape=(1, 1)):
    states, metrics = tiny.run(config, tiny.make_mesh(*mesh_shape), steps)
    return states, [{name: float(value) for name, value in found.items()} for found in metrics]


def test_projector_is_trained_but_neither_averaged_nor_sampled():
    states, metrics = train(make_small(), 2)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), states[0].params["repa"], states[2].params["repa"])
    assert all(jax.tree.leaves(moved))
    assert set(states[2].params) - set(states[2].ema) == {"repa"}
    assert metrics[1]["grad_norm_repa"] > 0 and -1 <= metrics[1]["loss_repa"] <= 1
    assert metrics[1]["cosine_repa"] == pytest.approx(-metrics[1]["loss_repa"])
    assert metrics[1]["loss"] == pytest.approx(metrics[1]["loss_flow"] + 0.5 * metrics[1]["loss_repa"], rel=1e-6)


def test_a_later_block_needs_no_projector():
    states, metrics = train(make_small(target="later_block"), 1)
    assert "repa" not in states[0].params and "grad_norm_repa" not in metrics[0]
    assert -1 <= metrics[0]["loss_repa"] <= 1


def test_alignment_ends_at_stop_step():
    """From then on the loss is that of the model alone, whose parameters start as without alignment."""
    states, metrics = train(make_small(stop_step=1), 2)
    plain = train(make_small(target="none"), 1)[0][0].params
    jax.tree.map(np.testing.assert_array_equal, plain, {k: v for k, v in states[0].params.items() if k != "repa"})
    assert metrics[0]["loss"] != metrics[0]["loss_flow"] and metrics[1]["loss"] == metrics[1]["loss_flow"]
    assert metrics[0]["grad_norm_repa"] > 0 == metrics[1]["grad_norm_repa"]
    assert metrics[1]["cosine_repa"] == 0


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_meshes_and_microbatches_give_the_same_step(projector):
    """XLA's own convolution has a gradient that is 4 times too small on the second mesh."""
    whole, parts = make_small(projector=projector), make_small(projector=projector)
    parts.train.accumulate_steps = 2
    expected, found = train(whole, 2)[1], train(parts, 2, (2, 2, 2))[1]
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repa.block": 4}, "config.repa.block = 4 must be in 1 to 3"),
        ({"repa.target": "later_block", "repa.later_block": 2}, "later_block = 2 must be in config.repa.block + 1 = 3"),
        ({"repa.target": "later_block", "repa.later_block": 4}, "later_block = 4 must be in config.repa.block + 1 = 3"),
        ({"repa.target": "dino"}, "config.repa.target"),
        ({"repa.encoder": "dinov2_g"}, "config.repa.encoder"),
        ({"repa.coefficient": float("nan")}, "config.repa.coefficient"),
        ({"repa.projector": "linear"}, "config.repa.projector"),
        ({"repa.standardize": True, "model.patch_size": 8}, "config.repa.standardize needs several tokens"),
        (
            {"data.source": "synthetic", "model.space": "latents", "model.channels": 4},
            "config.repa.target = hog needs images",
        ),
    ],
)
def test_bad_input_is_one_line(change, words):
    config = make_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        validate(config)
    assert "\n" not in str(error.value)


def test_a_wrong_encoder_is_told_before_anything_is_compiled(tmp_path):
    from dar_jax.pretrained import dino, dino_weights
    from dar_jax.training import loop

    config = make_config(target="encoder", encoder="dinov2_s")
    with pytest.raises(UserError, match=r'config\.repa\.weights = "" must name the encoder: .* --kind=dinov2 has made'):
        loop.train(config, str(tmp_path / "run"))
    network = dino.Dino(**{**dino.SIZES["dinov2_s"], "depth": 1, "hidden_size": 64, "num_heads": 1})
    params = sharding.unbox(dino.initial(network))
    config.repa.weights = str(tmp_path / "dino")
    dino_weights.write(config.repa.weights, dino_weights.Encoder(network, params, "0"))
    with pytest.raises(UserError, match=r"has hidden_size = 64, but config\.repa.encoder = dinov2_s has 384"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert dataclasses.is_dataclass(network)
