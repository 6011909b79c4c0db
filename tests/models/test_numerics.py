"""The matmul and the LayerNorm of a block against NumPy, and what a block keeps for its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models import layers, numerics

TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("outputs", [(7,), (3, 7)])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_matmul(leading, outputs, dtype, platform, monkeypatch):
    """Value and gradients of sum(g * value), in either order of computation, against float64 einsums."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        shapes = (*leading, 6), (6, *outputs), (*leading, *outputs)
        arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
        x, kernel, g = (np.asarray(a, np.float64) for a in arrays)
        flat_x, flat_kernel, flat_g = x.reshape(-1, 6), kernel.reshape(6, -1), g.reshape(-1, kernel[0].size)
        references = (
            np.einsum("ni,io->no", flat_x, flat_kernel).reshape(g.shape),
            np.einsum("no,io->ni", flat_g, flat_kernel).reshape(x.shape),
            np.einsum("ni,no->io", flat_x, flat_g).reshape(kernel.shape),
        )
        value, vjp = jax.vjp(numerics.matmul, *arrays[:2])
        for actual, reference in zip((value, *vjp(arrays[2])), references, strict=True):
            assert actual.dtype == dtype
            error = np.linalg.norm(np.asarray(actual, np.float64) - reference) / np.linalg.norm(reference)
            assert error < TOLERANCE[dtype], error


def test_a_block_keeps_its_dense_outputs_only():
    """Of the tokens of both branches: the input, q, k and v in one, the hidden MLP layer, and each branch's output."""
    b, t, d = 2, 5, 8
    block = layers.Block(d, 2, 4.0, numerics.Arithmetic(jnp.float32))
    h, condition = jnp.ones((b, t, d)), jnp.ones((b, d))

    def both(block, h, condition):
        return [branch(h, gate) for branch, _, _, gate in block.branches(condition)]

    params = block.init(jax.random.key(0), h, condition, method=both)["params"]
    _, vjp = jax.vjp(lambda params, h: block.apply({"params": params}, h, condition, method=both), params, h)
    kept = {id(x): x.shape for x in jax.tree.leaves(vjp) if x.shape[0] == b and x.shape[1:] != (1, d) and x.ndim > 2}
    assert sorted(kept.values()) == [(b, t, 3, d), *[(b, t, d)] * 3, (b, t, 4 * d)]


@pytest.mark.parametrize("scale, offset, outlier", [(1, 0, 0), (1, 1000, 0), (1e-4, 0, 0), (0, 3, 0), (1, 0, 1000)])
def test_layer_norm(scale, offset, outlier):
    """Value and gradient in float32, also far from zero, and where one feature, at worst the first, is huge."""
    rng = np.random.default_rng(0)
    x, g = scale * rng.normal(size=(8, 384)) + offset, rng.normal(size=(8, 384))
    x[:, 0] += outlier
    x = x.astype(np.float32).astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    value = centred * inverse
    gradient = inverse * (g - g.mean(-1, keepdims=True) - value * (g * value).mean(-1, keepdims=True))
    found, vjp = jax.vjp(layers.layer_norm, jnp.asarray(x, jnp.float32))
    for actual, expected in ((found, value), (vjp(jnp.asarray(g, jnp.float32))[0], gradient)):
        error = np.linalg.norm(actual - expected)
        assert error <= (1e-4 if outlier else 5e-7) * np.linalg.norm(expected)
