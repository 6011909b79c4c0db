"""Adapters of both model families: gradients, merged weights, the fresh start, and no gradient of what is frozen."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.errors import UserError
from dar_jax.models import lora
from dar_jax.planning import count_flops

ROUTED = {"kind": "dar", "query": "static_t", "chunk_size": 2, "summary": "sum"}
RANK, SCALE = 3, 0.75


def config_of(family="sit", routing=None, **fields):
    config = config_lib.default().model
    config.update(family=family, input_size=4, patch_size=2, channels=2, depth=2, hidden_size=24, num_heads=2)
    config.update(num_classes=3, text_size=12, text_length=4, text_depth=1, words=("a", "b"), **fields)
    config.routing.update(routing or {"kind": "residual"})
    return config


def inputs(family, rng):
    condition = {"label": jnp.array([0, 3])} if family == "sit" else {"words": jnp.array([[2, 3, 0, 0], [1, 0, 0, 0]])}
    return jnp.asarray(rng.normal(size=(2, 4, 4, 2))), jnp.array([0.3, 0.8]), condition


def random_parts(model, family, rng, targets=()):
    """A base and a trained tree whose leaves are all random."""
    boxed = jax.eval_shape(lambda key: model.init(key, *inputs(family, rng))["params"], jax.random.key(0))
    fresh = jax.eval_shape(lambda key: lora.init(key, boxed, RANK, targets), jax.random.key(0))
    routing, base = lora.split(nn.meta.unbox(boxed))
    fill = lambda tree: jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape)), tree)  # noqa: E731
    return fill(base), fill(lora.union(routing, nn.meta.unbox(fresh)))


CASES = [
    ("sit", None, "dense"),
    ("sit", ROUTED, "block"),
    pytest.param("sit", {**ROUTED, "chunk_size": 4, "query": "dynamic"}, "dense", marks=pytest.mark.slow),
    ("sit", {**ROUTED, "kind": "delta"}, "block"),
    pytest.param("mmdit", None, "block", marks=pytest.mark.slow),
    ("mmdit", {**ROUTED, "streams": "both"}, "block"),
    pytest.param("mmdit", {**ROUTED, "query": "dynamic"}, "dense", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "routing", "remat"), CASES, ids=str)
def test_gradients_equal_those_of_merged_kernels(family, routing, remat):
    """The prediction and the gradients of A, B and routing against plain autodiff of W + s A B, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        config = config_of(family, routing, remat=remat)
        with config.unlocked():
            config.dtype = "float64"
        model, plain = models.build(config), models.build(config, plain=True)
        base, trained = random_parts(model, family, rng)
        given, probe = inputs(family, rng), rng.normal(size=(2, 4, 4, 2))

        def loss(model, params_of, trained):
            prediction = model.apply({"params": params_of(trained)}, *given).prediction
            return jnp.sum(prediction * probe), prediction

        def assembled(trained):
            return lora.assemble(base, trained, SCALE)

        def merged(trained):
            leaves = traverse_util.flatten_dict(lora.union(base, trained), sep="/")
            for path in [path for path in leaves if path.endswith("lora_a")]:
                layer = path.removesuffix("lora_a")
                a, b = leaves.pop(path), leaves.pop(f"{layer}lora_b")
                leaves[f"{layer}kernel"] += SCALE * jnp.einsum("lir,lr...->li...", a, b)
            return traverse_util.unflatten_dict(leaves, sep="/")

        def gradient(model, params_of):
            return jax.jit(jax.grad(functools.partial(loss, model, params_of), has_aux=True))(trained)

        found, prediction = gradient(model, assembled)
        wanted, expected = gradient(plain, merged)
        np.testing.assert_allclose(prediction, expected, rtol=1e-9, atol=1e-10)
        leaves = traverse_util.flatten_dict(found, sep="/")
        assert any("gate" in path for path in leaves) == bool(routing and routing["kind"] == "delta")
        whole = max(np.abs(g).max() for g in leaves.values())
        for (path, g), w in zip(leaves.items(), traverse_util.flatten_dict(wanted).values(), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-7, atol=1e-12 * whole, err_msg=path)
        assert all(np.any(g) for path, g in leaves.items() if path.endswith("lora_a") and "text" not in path)
        for a, b in zip(jax.tree.leaves(lora.merge(assembled(trained))), jax.tree.leaves(merged(trained)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_fresh_adapters_change_nothing():
    """A as in peft, B zero, on the linear layers of attention and MLP of both streams; one base, several adapters."""
    model, rng = models.build(config_of("mmdit")), np.random.default_rng(1)
    base, _ = random_parts(model, "mmdit", rng)
    given = inputs("mmdit", rng)
    boxed = jax.eval_shape(lambda key: model.init(key, *given)["params"], jax.random.key(0))
    fresh = nn.meta.unbox(lora.init(jax.random.key(2), boxed, RANK))
    leaves = traverse_util.flatten_dict(fresh, sep="/")
    linear = [f"{stream}/{layer}" for stream in ("text", "image") for layer in ("q", "k", "v", "out", "mlp/dense_0")]
    layers = {f"stack/steps/block_0/{name}" for name in [*linear, "text/mlp/dense_1", "image/mlp/dense_1"]}
    assert {path.rpartition("/")[0] for path in leaves} == layers
    for path, leaf in leaves.items():
        if path.endswith("lora_b"):
            assert not np.any(leaf)
        else:
            bound = leaf.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound and abs(leaf.mean()) < 0.2 * bound
            assert not np.array_equal(leaf[0], leaf[1])
    apply = jax.jit(lambda params: model.apply({"params": params}, *given).prediction)
    alone, other = apply(base), jax.tree.map(lambda x: x + 0.1, fresh)
    with jax.disable_jit():  # compiled as one, the two programs are fused differently and round differently
        np.testing.assert_array_equal(apply(lora.assemble(base, fresh, 2.0)), apply(base))
    assert np.abs(apply(lora.assemble(base, other, 2.0)) - alone).max() > 1e-3


def test_targets_choose_layers():
    model, rng = models.build(config_of()), np.random.default_rng(1)
    boxed = jax.eval_shape(lambda key: model.init(key, *inputs("sit", rng))["params"], jax.random.key(0))
    chosen = lora.init(jax.random.key(0), boxed, 2, (r"stack/.*/adaln/kernel", "head/dense/kernel"))
    shapes = {k: v.value.shape for k, v in traverse_util.flatten_dict(chosen, sep="/").items()}
    assert shapes == {
        "stack/steps/block_0/adaln/lora_a": (2, 24, 2),
        "stack/steps/block_0/adaln/lora_b": (2, 2, 144),
        "head/dense/lora_a": (24, 2),
        "head/dense/lora_b": (2, 8),
    }
    qkv = lora.init(jax.random.key(0), boxed, 2, ("stack/.*/qkv/kernel",))["stack"]["steps"]["block_0"]["attention"]
    assert qkv["qkv"]["lora_b"].value.shape == (2, 2, 3, 24)
    assert qkv["qkv"]["lora_b"].names == ("layers", "rank", "qkv", "adapter")
    with pytest.raises(UserError, match=r'no kernel is called "stack/.*/query/kernel"; kernels are like head/adaln'):
        lora.init(jax.random.key(0), boxed, 2, ("stack/.*/query/kernel",))


slow = pytest.mark.slow
FLOP_CASES = [("sit", ROUTED), pytest.param("mmdit", ROUTED, marks=slow), pytest.param("sit", None, marks=slow)]


@pytest.mark.parametrize(("family", "routing"), FLOP_CASES, ids=str)
def test_no_gradient_of_the_base_is_computed(family, routing):
    """No matrix of a kernel's shape is made, and a step takes two passes' FLOPs besides the forward one, not three."""
    model, rng = models.build(config_of(family, routing, remat="block")), np.random.default_rng(1)
    base, trained = random_parts(model, family, rng)
    given = inputs(family, rng)

    def loss(trained, base):
        return jnp.sum(model.apply({"params": lora.assemble(base, trained, SCALE)}, *given).prediction)

    def kernels_made(gradient) -> set[str]:
        text = jax.jit(gradient).lower(trained, base).compile().as_text()
        products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
        return {shape for shape in products if shape in ("24,24", "24,72", "24,96", "96,24")}

    assert kernels_made(jax.grad(loss, (0, 1)))
    assert not kernels_made(jax.grad(loss))
    forward, both, adapters = (
        count_flops(jax.make_jaxpr(f)(trained, base).jaxpr) for f in (loss, jax.grad(loss, (0, 1)), jax.grad(loss))
    )
    print(
        f"FLOPs of a gradient over those of the forward pass: {both / forward:.2f}, adapters {adapters / forward:.2f}"
    )
    assert adapters < both - 0.6 * forward
