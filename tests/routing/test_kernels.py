"""The passes over the history, for XLA, TPU and GPU, against PyTorch's autodiff of a plain softmax in float64.

On the CPU kernels are interpreted. That the real compilers take them is tested for TPU v5e (with libtpu) and for CUDA
(lowering to Triton); nothing here runs on either.
"""

import functools
import math

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies
from ml_collections import ConfigDict

from dar_jax.models.layers import Block
from dar_jax.models.numerics import Arithmetic
from dar_jax.models.stack import RoutedStack
from dar_jax.routing import QUERIES, Execution, Layout, inverse_rms, read, sublayer_input
from dar_jax.routing.kernels import gpu, tpu, xla
from dar_jax.sharding import AXES, RULES, make_mesh
from tests.libtpu import needs_libtpu, printed_with_libtpu

MODULES = {"xla": xla, "tpu": tpu, "gpu": gpu}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 tokens, so that few tokens make several, the last of them not full."""
    monkeypatch.setattr(tpu, "VMEM_PER_TILE", 0)


@functools.partial(jax.jit, static_argnames="flavour")
def run(flavour, u, sources, count, g, l, before):
    """All passes: what a read returns, the cotangent of its queries, and that of its sources plus `before`."""
    interpret = {} if flavour == "xla" else {"interpret": True}
    module, inv_rms = MODULES[flavour], inverse_rms(sources)
    aggregates, log_sum = module.forward(u, sources, inv_rms, count, **interpret)
    arguments = u, sources, inv_rms, count

    def cotangents(before):
        if u[0].shape[1] == 1:
            return module.cotangents(before, *arguments, aggregates, log_sum, g, l, **interpret)
        d_u, new_l = module.query_cotangent(*arguments, aggregates, log_sum, g, l, **interpret)
        return module.add_source_cotangent(before, *arguments, log_sum, g, new_l, **interpret), d_u

    added, d_u = cotangents(before)
    d_sources = {"d_sources": added, "d_sources alone": cotangents(None)[0]}
    return {"aggregates": aggregates, "log_sum": log_sum, "d_u": d_u, **d_sources}


def reference(u, sources, count, g, l, before):
    """The same as the paper writes it."""
    u, sources, g, l, before = (torch.tensor(np.asarray(x, np.float64)) for x in (u, sources, g, l, before))
    u.requires_grad, sources.requires_grad = True, True
    filled = sources[:count]
    keys = filled / torch.sqrt(filled.square().mean(-1, keepdim=True) + 1e-6)
    scores = (u[:, None] * keys).sum(-1)
    aggregates = (scores.softmax(1)[..., None] * filled).sum(1)
    log_sum = scores.logsumexp(1)
    torch.autograd.backward((aggregates, log_sum), (g, l))
    values = {"aggregates": aggregates, "log_sum": log_sum, "d_u": u.grad, "d_sources": before + sources.grad}
    values["d_sources alone"] = sources.grad
    # In d_u, sum_k alpha_k (g . v_k - g . aggregate + l) k_k, the two products cancel: rounding is relative to them.
    products = (scores.softmax(1) * (g[:, None] * filled).sum(-1).abs())[..., None] * keys.abs()
    size_of_terms = {name: torch.linalg.norm(value) for name, value in values.items()}
    size_of_terms["d_u"] = torch.linalg.norm(products.sum(1) if u.shape[2] > 1 else products.sum((1, 3)))
    return values, size_of_terms


@strategies.composite
def cases(draw):
    rows = draw(strategies.integers(1, 7))
    tokens = draw(strategies.sampled_from([1, 2, 5, 16, 20, 33]))
    return {
        "rows": rows,
        "count": draw(strategies.integers(1, rows)),
        "queries": draw(strategies.integers(1, 4)),
        "batch": draw(strategies.integers(1, 3)),
        "tokens": tokens,
        "size": draw(strategies.sampled_from([4, 8, 24, 72, 128, 136])),
        "per_token": draw(strategies.booleans()),
        "seed": draw(strategies.integers(0, 2**16)),
    }


def check_history(flavour, dtype, case):
    """Values, cotangents of queries and of sources; the relative error is that of the whole array."""
    rows, batch, tokens, size, queries = (case[k] for k in ("rows", "batch", "tokens", "size", "queries"))
    rng = np.random.default_rng(case["seed"])

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    u = (normal(queries, batch, tokens if case["per_token"] else 1, size) * 2 * size**-0.5).astype(dtype)
    sources = (normal(rows, batch, tokens, size) * jnp.exp(0.5 * normal(rows, batch, tokens, 1))).astype(dtype)
    g, l = normal(queries, batch, tokens, size).astype(dtype), normal(queries, batch, tokens)
    before = normal(*sources.shape).astype(dtype)

    actual = run(flavour, tuple(u), sources, jnp.int32(case["count"]), tuple(g), l, before)
    expected, size_of_terms = reference(u, sources, case["count"], g, l, before)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for name, value in actual.items():
        value, wanted = np.asarray(jnp.asarray(value), np.float64), expected[name].detach().numpy()
        error = np.linalg.norm(value - wanted) / max(np.linalg.norm(wanted), size_of_terms[name].item())
        assert error < tolerance, f"{name}: relative error {error:.1e} in {case}"


@functools.partial(jax.jit, static_argnames="flavour")
def run_sublayer_input(flavour, u, values, log_sum, modulation, g, before):
    """What a sublayer reads, and all cotangents, those of the recent sources added to `before`."""
    interpret = {} if flavour == "xla" else {"interpret": True}
    module = MODULES[flavour]
    arguments = u, values, (log_sum, *(inverse_rms(v) for v in values[1:])), modulation
    (x,) = module.sublayer_input(*arguments, **interpret)
    d_u, d_values, (d_log_sum,), d_modulation = module.sublayer_input_cotangents(*arguments, (g,), before, **interpret)
    return {"x": x, "d_u": d_u, "d_values": d_values, "d_log_sum": d_log_sum, "d_modulation": d_modulation}


def sublayer_input_reference(u, values, log_sum, modulation, g, before):
    """The same as the paper writes it, and the size of the terms that each result sums up."""
    leaves = u, values, log_sum, modulation, g, before
    u, values, log_sum, modulation, g, before = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), leaves)
    inputs = [*u, *values, log_sum, *modulation]
    for x in inputs:
        x.requires_grad = True
    keys = [v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) for v in values[1:]]
    alpha = torch.stack([log_sum, *((u[0] * k).sum(-1) for k in keys)]).softmax(0)[..., None]
    h = (alpha * torch.stack(values)).sum(0)
    h.retain_grad()
    x = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + modulation[1]) + modulation[0]
    x.backward(g)
    gradients = [i.grad for i in inputs]
    d_values = torch.stack(
        [gradients[len(u)], *(a + b for a, b in zip(gradients[len(u) + 1 : len(inputs) - 3], before, strict=True))]
    )
    found = {"x": x, "d_u": [i.grad for i in u], "d_values": d_values, "d_log_sum": log_sum.grad}
    found["d_modulation"] = torch.stack([m.grad for m in modulation])
    # A score's cotangent, alpha_k (h' . v_k - h' . h), is a difference of sums; rounding is relative to their terms.
    parts = alpha[..., 0] * (h.grad * torch.stack(values)).abs().sum(-1)
    sizes = {name: torch.linalg.norm(value) for name, value in found.items() if name != "d_u"}
    sizes["d_log_sum"] = torch.linalg.norm(parts[0])
    terms = sum((part[..., None] * key.abs() for part, key in zip(parts[1:], keys, strict=True)), torch.zeros(()))
    sizes["d_u"] = torch.linalg.norm(terms if u and u[0].shape[1] > 1 else terms.sum(1) if u else terms)
    return found, sizes


def check_sublayer_input(flavour, dtype, case):
    """Values and all cotangents of `rows - 1` recent sources and an aggregate."""
    batch, tokens, size, recent = case["batch"], case["tokens"], case["size"], min(case["rows"] - 1, 3)
    rng = np.random.default_rng(case["seed"])

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    u = (normal(batch, tokens if case["per_token"] else 1, size) * 2 * size**-0.5).astype(dtype)
    values = normal(recent + 1, batch, tokens, size) * jnp.exp(0.5 * normal(recent + 1, batch, tokens, 1))
    before, g = normal(recent, batch, tokens, size).astype(dtype), normal(batch, tokens, size).astype(dtype)
    modulation = normal(2, batch, 1, size).astype(dtype)
    arguments = (
        (u,) * bool(recent),
        tuple(values.astype(dtype)),
        normal(batch, tokens),
        tuple(modulation),
        g,
        tuple(before),
    )

    actual = run_sublayer_input(flavour, *arguments)
    expected, sizes = sublayer_input_reference(*arguments)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for name, value in actual.items():
        for a, b in zip(value, expected[name], strict=True):
            error = np.linalg.norm(np.asarray(a, np.float64) - b.detach().numpy())
            error /= max(b.detach().norm().item(), sizes[name].item())
            assert error < tolerance, f"{name}: relative error {error:.1e} in {case}"


SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "phases": [hypothesis.Phase.generate],  # no shrinking: every case compiles
    "suppress_health_check": list(hypothesis.HealthCheck),
}
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flavour", MODULES)
@hypothesis.settings(max_examples=5, **SETTINGS)
@hypothesis.given(case=cases())
def test_values_and_gradients(flavour, dtype, case):
    check_history(flavour, dtype, case)
    check_sublayer_input(flavour, dtype, case)


@pytest.mark.slow
@hypothesis.settings(max_examples=300, **SETTINGS)
@hypothesis.given(flavour=strategies.sampled_from(["tpu", "gpu"]), dtype=strategies.sampled_from(DTYPES), case=cases())
def test_values_and_gradients_over_300_shapes(flavour, dtype, case):
    check_history(flavour, dtype, case)
    check_sublayer_input(flavour, dtype, case)


@pytest.mark.parametrize(("query", "shape", "layout"), [
    ("static_t", (1, 1, 1), Layout(4, 4)), ("dynamic", (1, 1, 1), Layout(4, 4)),
    ("static_t", (2, 2, 2), Layout(4, 4)), ("dynamic", (2, 1, 4), Layout(4, 4)),
    ("static", (2, 2, 2), Layout(4, 4, "sum", is_additive=True)),
])  # fmt: skip
def test_stack_with_kernels_equals_the_plain_one(query, shape, layout):
    """Gradients of a whole stack, on one device and split over a mesh: a kernel sees its samples and tokens only."""
    block = functools.partial(Block, 8, 2, 2.0, Arithmetic(jnp.float32))
    rng = np.random.default_rng(0)
    shapes = (8, 4, 8), (8, 8), (8, 8), (8, 1, 8), (8, 1, 8)
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    mesh = make_mesh(ConfigDict(dict(zip(AXES, shape, strict=True))), jax.devices()[: math.prod(shape)])

    def gradients(implementation):
        stack = RoutedStack(block, layout, QUERIES[query], implementation, "block")
        abstract = nn.meta.unbox(jax.eval_shape(stack.init, jax.random.key(1), *inputs)["params"])
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, jnp.float32), abstract)
        loss = lambda p, *x: jnp.sum(jnp.sin(stack.apply({"params": p}, *x)[0]))  # noqa: E731
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(params, *inputs)
            return lowered.compile()(params, *inputs), lowered.as_text()

    (plain, _), (fused, text) = gradients("xla"), gradients("pallas")
    assert ("sdy.manual_computation" in text) == (shape != (1, 1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, jnp.abs(b).max())), fused, plain)


SHAPES = [  # rows, queries, tokens, size, dtype, per token
    (15, 4, 256, 1152, "bfloat16", False),
    (15, 1, 256, 1152, "bfloat16", True),
    (57, 1, 300, 384, "float32", False),
    (3, 2, 20, 72, "float32", True),
]


def num_kernels(shape) -> int:
    """Both ways of both passes; queries per token have their cotangent and that of the sources one after the other."""
    return 4 + shape[-1]


def all_kernels(rows, queries, tokens, size, dtype, per_token, batch, axes=()):
    """A function that runs all kernels, and its abstract arguments."""
    abstract = jax.ShapeDtypeStruct
    u = queries * (abstract((batch, tokens if per_token else 1, size), dtype),)
    sources, inv_rms = abstract((rows, batch, tokens, size), dtype), abstract((rows, batch, tokens), jnp.float32)
    g, l = queries * (abstract((batch, tokens, size), dtype),), abstract((queries, batch, tokens), jnp.float32)

    def function(u, sources, inv_rms, count, g, l):
        how = Execution("auto", *axes)

        def forward(u, v):
            aggregates, log_sum = read(how, u, v, inv_rms, count)
            zero = jnp.zeros((batch, 1, size), dtype)
            arguments = u[0].astype(jnp.float32), aggregates[0], log_sum[0], (v[0],), (inv_rms[0],), zero, zero
            return (aggregates, log_sum), sublayer_input(how, *arguments)

        values, vjp = jax.vjp(forward, u, sources)
        return values, vjp(((g, l), (g[0], (g[0],))))

    return function, (u, sources, inv_rms, abstract((), jnp.int32), g, l)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_lower_to_triton_for_cuda(shape):
    function, arguments = all_kernels(*shape, batch=2)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == num_kernels(shape)


@needs_libtpu
def test_kernels_compile_for_a_tpu():
    assert printed_with_libtpu("tests.routing.test_kernels", timeout=600) == [
        str(num_kernels(shape)) for shape in SHAPES
    ]


def compile_for_v5e():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(ConfigDict({"data": 2, "fsdp": 1, "tensor": 2}), devices)
    axes = ("data",), ("tensor",)
    for shape in SHAPES:
        function, arguments = all_kernels(*shape, batch=8, axes=axes)

        def place(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

        P = jax.sharding.PartitionSpec
        per_query = P(*axes) if arguments[0][0].shape[1] > 1 else P(axes[0])
        specs = [per_query, P(None, *axes), P(None, *axes), P(), P(*axes), P(None, *axes)]
        placed = [jax.tree.map(lambda x: place(x, s), a) for a, s in zip(arguments, specs, strict=True)]  # noqa: B023
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*placed).compile()
        print(compiled.as_text().count('custom_call_target="tpu_custom_call"'))


def test_queries_in_groups_on_a_gpu_give_the_same(monkeypatch):
    """Three queries in groups of two, for each pass over the history. Vectors of 200 features have an end of zeros."""
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    u, g = tuple(random(2, 1, 200) for _ in range(3)), tuple(random(2, 3, 200) for _ in range(3))
    sources, l, count = random(5, 2, 3, 200), random(3, 2, 3), jnp.int32(4)
    inv_rms = inverse_rms(sources)

    def run():
        made, log_sum = gpu.forward(u, sources, inv_rms, count, interpret=True)
        shared = gpu.cotangents(None, u, sources, inv_rms, count, made, log_sum, g, l, interpret=True)
        u_t = tuple(jnp.broadcast_to(x, y.shape) for x, y in zip(u, g, strict=True))
        found = gpu.query_cotangent(u_t, sources, inv_rms, count, made, log_sum, g, l, interpret=True)
        last = gpu.add_source_cotangent(None, u_t, sources, inv_rms, count, log_sum, g, found[1], interpret=True)
        return made, log_sum, shared, found, last

    together = run()
    monkeypatch.setattr(gpu, "queries_at_once", lambda size: 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(), together)
    assert gpu.parts_of(1152) == [(0, 1024), (1024, 128)] and gpu.parts_of(200) == [(0, 256)]


if __name__ == "__main__":
    compile_for_v5e()
