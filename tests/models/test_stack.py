"""The scanned stack with its own backward pass against an unrolled PyTorch reference, its source sets and memory."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dar_jax.models import stack as stack_module
from dar_jax.models.layers import Block
from dar_jax.models.numerics import Arithmetic
from dar_jax.models.plain_stack import ResidualStack
from dar_jax.models.stack import RoutedStack
from dar_jax.routing import QUERIES, Layout
from tests.parity import torch_stack

BATCH, TOKENS, SIZE, HEADS = 2, 3, 8, 2


def make(stack, dtype):
    """Random parameters (also those initialised at zero) and v_0, condition, e(t), the head's shift and scale."""
    rng = np.random.default_rng(0)
    shapes = (BATCH, TOKENS, SIZE), (BATCH, SIZE), (BATCH, SIZE), (BATCH, 1, SIZE), (BATCH, 1, SIZE)
    inputs = [rng.normal(size=s) for s in shapes]
    inputs = [jnp.asarray(x, dtype) for x in inputs]
    abstract = nn.meta.unbox(jax.eval_shape(stack.init, jax.random.key(1), *inputs)["params"])
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, dtype), abstract)
    return params, inputs


def routed(layout, query, dtype=jnp.float32, remat="block"):
    block = functools.partial(Block, SIZE, HEADS, 2.0, Arithmetic(dtype))
    return RoutedStack(block, layout, QUERIES[query], "auto", remat)


def value_and_gradients(stack, params, inputs, probe):
    def loss(params, inputs):
        h, _ = stack.apply({"params": params}, *inputs)
        return jnp.sum(h * probe), h

    gradients, h = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, inputs)
    return {"h": h, "gradients": gradients}


def torch_value_and_gradients(forward, params, inputs, probe):
    params, inputs = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), (params, inputs))
    h = forward(params, *inputs)
    (h * torch.tensor(probe)).sum().backward()
    gradients = jax.tree.map(lambda x: x.grad.numpy() if x.grad is not None else np.zeros(x.shape), (params, inputs))
    return {"h": h.detach().numpy(), "gradients": gradients}


def assert_close(actual, expected, tolerance):
    def check(path, a, b):
        # With one source a query has no effect: its gradient is zero, up to rounding of terms of order one.
        error = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 4e-3)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def check_stack(stack, reference, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, inputs = make(stack, dtype)
        probe = np.random.default_rng(7).normal(size=inputs[0].shape).astype(dtype)
        actual = value_and_gradients(stack, params, inputs, probe)
        expected = torch_value_and_gradients(reference, params, inputs, probe)
        assert_close(actual, expected, 1e-5 if dtype == jnp.float32 else 1e-12)


LEARNED = ("static", "static_t", "dynamic")
STRUCTURES = list(itertools.product(("last", "sum"), ("dedicated", "shared", "summaries")))
CASES = [
    (depth, chunk_size, query, summary, final)
    for depth in (4, 6)
    for chunk_size in (1, 2, 4, 2 * depth)
    for query in LEARNED
    for summary, final in STRUCTURES
    if not (chunk_size == 1 and summary == "sum")  # with S = 1 a sum is the output itself
]
# Each compiles for seconds (twelve sublayers in one step: for many): CI takes a cover, `-m slow` runs the rest.
QUICK = {case for case in CASES[::6] if case[1] != 12} | {(4, 8, "dynamic", "sum", "shared")}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(map(str, c))) for c in CASES]
)
def test_scan_equals_unrolled_reference(case):
    depth, chunk_size, query, summary, final = case
    layout = Layout(depth, chunk_size, summary, final)

    def reference(params, *inputs):
        *inputs, shift, scale = inputs
        return torch_stack.modulated_norm(
            torch_stack.routed_stack(params, layout, query, HEADS, *inputs)[0], shift, scale
        )

    check_stack(routed(layout, query, jnp.float64), reference, jnp.float64)


@pytest.mark.parametrize("remat", ["dense", "block"])
@pytest.mark.parametrize("query", LEARNED)
def test_scan_equals_unrolled_reference_in_float32(query, remat):
    layout = Layout(6, 4)

    def reference(params, *inputs):
        *inputs, shift, scale = inputs
        return torch_stack.modulated_norm(
            torch_stack.routed_stack(params, layout, query, HEADS, *inputs)[0], shift, scale
        )

    check_stack(routed(layout, query, remat=remat), reference, jnp.float32)


def test_gates_of_e_t_equal_the_reference():
    layout = Layout(4, 2)

    def reference(params, *inputs):
        *inputs, shift, scale = inputs
        return torch_stack.modulated_norm(
            torch_stack.routed_stack(params, layout, "gated_t", HEADS, *inputs)[0], shift, scale
        )

    check_stack(routed(layout, "gated_t", jnp.float64), reference, jnp.float64)


@pytest.mark.parametrize("remat", ["dense", "block"])
def test_residual_stack_equals_reference(remat):
    block = functools.partial(Block, SIZE, HEADS, 2.0, Arithmetic(jnp.float64))

    def reference(params, v_0, condition, e_t, shift, scale):
        return torch_stack.modulated_norm(torch_stack.residual_stack(params, 3, HEADS, v_0, condition), shift, scale)

    check_stack(ResidualStack(block, 3, remat), reference, jnp.float64)


@pytest.mark.parametrize(("chunk_size", "summary"), [(1, "last"), (2, "last"), (4, "last"), (4, "sum")])
def test_sublayer_reads_only_its_sources(chunk_size, summary):
    """Perturb v_0 through one sublayer's parameters: only aggregators that may see the change do.

    The derivative of the routed state h_l with respect to the gate of sublayer m (a bias of its own adaLN) is zero
    unless v_m reaches S_l, directly or through other sublayers. With every gate but one closed, nothing but the
    direct path is left, and the final state must move exactly if m is a source of the final aggregator.
    """
    depth = 4
    for final in ("dedicated", "summaries"):
        layout = Layout(depth, chunk_size, summary, final)
        stack = routed(layout, "static")
        params, inputs = make(stack, jnp.float32)
        per_step = layout.sublayers_per_step
        sources = torch_stack.source_sets(depth, chunk_size, final)[-1]

        def final_state(params):
            return stack.apply({"params": params}, *inputs)[0]  # noqa: B023

        closed = jax.tree.map(jnp.asarray, params)
        for i in range(per_step // 2):
            closed["steps"][f"block_{i}"]["adaln"] = jax.tree.map(
                jnp.zeros_like, params["steps"][f"block_{i}"]["adaln"]
            )
        apply = jax.jit(final_state)
        base = apply(closed)
        for m in range(1, 2 * depth + 1):
            step, position = divmod(m - 1, per_step)
            gate = (2 if m % 2 else 5) * SIZE
            opened = jax.tree.map(jnp.asarray, closed)
            adaln = opened["steps"][f"block_{position // 2}"]["adaln"]
            adaln["bias"] = adaln["bias"].at[step, gate : gate + SIZE].set(1.0)
            moved = bool(jnp.any(apply(opened) != base))
            chunk = -(-m // chunk_size)
            ends_chunk = summary == "sum" or m % chunk_size == 0
            expected = ("v", m) in sources or (ends_chunk and ("c", chunk) in sources)
            assert moved == expected, (chunk_size, summary, final, m)


def temp_bytes(depth, chunk_size, remat, query="static_t"):
    block = functools.partial(Block, 64, 2, 4.0, Arithmetic(jnp.float32))
    stack = RoutedStack(block, Layout(depth, chunk_size), QUERIES[query], "auto", remat)
    shapes = (8, 64, 64), (8, 64), (8, 64), (8, 1, 64), (8, 1, 64)
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    params = nn.meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), *inputs)["params"])
    loss = lambda p, *i: jnp.sum(stack.apply({"params": p}, *i)[0])  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params, *inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("query", ["static_t", "dynamic"])
def test_dense_remat_keeps_the_outputs_of_dense_layers_alone(query, monkeypatch):
    """Of every step those of two blocks, four each, and no aggregate. Of dynamic queries, too.

    Their newest source is a row of the history, and to keep it once more would have XLA copy all of that in every step.
    """
    kept = []

    def recorded(tree, known):
        saved = save(tree, known)
        kept.extend(x.shape for x in jax.tree.leaves(saved) if x.shape[:2] == (BATCH, TOKENS) and x.ndim > 2)
        return saved

    save = stack_module.save
    monkeypatch.setattr(stack_module, "save", recorded)
    stack = routed(Layout(4, 4), query, remat="dense")
    params, inputs = make(stack, jnp.float32)
    jax.make_jaxpr(jax.grad(lambda p: jnp.sum(stack.apply({"params": p}, *inputs)[0])))(params)
    outputs = [(3, SIZE), (SIZE,), (2 * SIZE,), (SIZE,)]  # qkv, out, dense_0, dense_1
    queries = 4 * [(SIZE,)] if query == "dynamic" else []
    assert sorted(kept) == sorted((BATCH, TOKENS, *shape) for shape in 2 * outputs + queries)


@pytest.mark.parametrize(("chunk_size", "remat"), [(1, "block"), (4, "block"), (4, "dense")])
def test_gradient_memory_is_linear_in_depth(chunk_size, remat):
    """Temporaries at depths 8, 16, 32: the second doubling may add at most 2.3 times what the first added."""
    small, middle, large = (temp_bytes(depth, chunk_size, remat) for depth in (8, 16, 32))
    assert large - middle < 2.3 * (middle - small), (small, middle, large)
