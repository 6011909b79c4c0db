"""The scanned stack with its own backward pass against the unrolled reference, its source sets and its memory."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.stack import RoutedStack
from dar_jax.routing import Layout
from tests.reference import source_sets, unrolled_stack

BATCH, TOKENS, SIZE = 2, 4, 16


def make(depth, chunk_size, query, summary="last", final="dedicated", dtype=jnp.float32):
    """A routed stack with random parameters (also those initialised at zero) and random inputs."""
    layout = Layout(depth, chunk_size, summary, final)
    block = {"hidden_size": SIZE, "num_heads": 2, "mlp_ratio": 2.0, "dtype": dtype}
    stack = RoutedStack(block, layout, query)
    keys = iter(jax.random.split(jax.random.key(0), 500))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    inputs = draw(BATCH, TOKENS, SIZE), draw(BATCH, SIZE), draw(BATCH, SIZE)
    params = nn.unbox(stack.init(jax.random.key(1), *inputs)["params"])
    params = jax.tree.map(lambda p: (p + 0.3 * draw(*p.shape)).astype(dtype), params)
    return stack, block, layout, params, inputs


def values_and_gradients(f, params, inputs):
    probe = jax.random.normal(jax.random.key(7), inputs[0].shape, inputs[0].dtype)

    def loss(params, *inputs):
        h = f(params, *inputs)
        return jnp.sum(h * probe), h

    gradients, h = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(params, *inputs)
    return h, gradients


def assert_close(actual, expected, tolerance):
    """Relative to the largest element of each array: the error of a gradient is set by its large terms."""
    for path, (a, b) in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True),
        strict=True,
    ):
        scale = max(float(jnp.max(jnp.abs(b))), 1e-30)
        error = float(jnp.max(jnp.abs(a - b))) / scale
        assert error < tolerance, f"{jax.tree_util.keystr(path[0])}: relative error {error:.2e}"


CASES = [
    case
    for depth in (4, 6)
    for case in itertools.product(
        [depth], [1, 2, 4, 2 * depth], ["static", "static_t", "dynamic"], ["last", "sum"],
        ["dedicated", "shared", "summaries"],
    )
    if not (case[1] == 1 and case[3] == "sum")  # with S = 1 a sum is the output itself
]  # fmt: skip


@pytest.mark.parametrize(("depth", "chunk_size", "query", "summary", "final"), CASES)
def test_scan_equals_unrolled_reference(depth, chunk_size, query, summary, final):
    stack, block, layout, params, inputs = make(depth, chunk_size, query, summary, final)
    apply = jax.jit(lambda p, *i: stack.apply({"params": p}, *i))
    actual = values_and_gradients(apply, params, inputs)
    expected = values_and_gradients(
        lambda p, *i: unrolled_stack(p, block, layout, query, *i)[0], params, inputs
    )
    assert_close(actual, expected, 1e-5)
