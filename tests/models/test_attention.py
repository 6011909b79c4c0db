"""Attention by kernels, interpreted on the CPU, against the plain form; that the real compilers take them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dar_jax import config as config_lib
from dar_jax import sharding
from dar_jax.models import attention, attention_gpu, attention_short, attention_tpu, layers, numerics
from dar_jax.planning.schedule import CHIPS, count_flops, read_schedule
from tests.libtpu import needs_libtpu, printed_with_libtpu

KERNELS = {"tpu": attention_tpu, "gpu": attention_gpu}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "block_size", lambda tokens: 128)


def arrays(batch, queries, keys, heads, size=128, dtype=jnp.float32, masked=True):
    """Queries, keys, values, a mask that leaves one block of keys empty, and a gradient of the output."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(2 * rng.normal(size=(batch, tokens, heads, size)), dtype)
        for tokens in (queries, keys, keys, queries)
    )
    is_read = rng.random((batch, keys)) < 0.7
    is_read[0, :128] = keys <= 128
    return (q, k, v, jnp.asarray(is_read) if masked else None), g


def relative(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def check(arguments, g, attend, tolerance):
    """Outputs and gradients of q, k and v against the plain form in float32."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, q, k, v, key_mask, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, key_mask), q, k, v)
        return out, vjp(g)

    found = run(attend, *arguments, g)
    single = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), (*arguments, g))
    expected = run(attention.plain, *single)
    for a, b, x in zip(jax.tree.leaves(found), jax.tree.leaves(expected), (g, *arguments), strict=False):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert relative(a, b) < tolerance


def interpreted(kernels):
    """`attention.attention` with the passes of `kernels` interpreted."""

    class Passes:
        forward = staticmethod(functools.partial(kernels.forward, interpret=True))
        backward = staticmethod(functools.partial(kernels.backward, interpret=True))

    return Passes


CASES = [  # queries, keys, heads, dtype, whether there is a mask
    (200, 300, 2, jnp.float32, True),
    (256, 128, 1, jnp.float32, False),
    (70, 130, 1, jnp.float32, False),
    (130, 257, 1, jnp.bfloat16, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("flavour", KERNELS)
def test_kernels_equal_the_plain_form(flavour, case, monkeypatch):
    """Also for lengths that no block divides, unlike for queries and keys, and for a block of masked keys alone."""
    queries, keys, heads, dtype, masked = case
    monkeypatch.setattr(attention, "LEAST_KEYS_OF_KERNELS", 64)
    monkeypatch.setattr(attention, "_Blockwise", interpreted(KERNELS[flavour]))
    arguments, g = arrays(2, queries, keys, heads, dtype=dtype, masked=masked)
    check(arguments, g, attention.attention, 1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("size", [64, 72])
def test_kernels_of_gpus_take_other_heads(size):
    arguments, g = arrays(1, 130, 140, 2, size=size)
    out, log_sum = attention_gpu.forward(*arguments, interpret=True)
    assert relative(out, attention.plain(*arguments)) < 1e-5
    gradients = attention_gpu.backward(*arguments, out, log_sum, g, interpret=True)
    expected = jax.vjp(lambda q, k, v: attention.plain(q, k, v, arguments[3]), *arguments[:3])[1](g)
    assert max(map(relative, gradients, expected)) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "dtype", "masked"),
    [
        (64, 3, 72, jnp.float32, False),
        (32, 4, 24, jnp.float32, True),
        (48, 2, 72, jnp.bfloat16, True),
        (144, 2, 8, jnp.float32, True),
    ],
)
def test_kernels_of_few_tokens_equal_the_plain_form(tokens, heads, size, dtype, masked):
    """Heads of 72 features lie across the lanes of a tile; a head of 24 shares its tile with others."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(2 * rng.normal(size=(2, tokens, 3, heads * size)), dtype)
    g = jnp.asarray(rng.normal(size=(2, tokens, heads * size)), dtype)
    key_mask = jnp.asarray(rng.random((2, tokens)) < 0.7) if masked else None
    assert attention_short.supports(qkv, size)
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    expected, vjp = jax.vjp(
        lambda qkv: attention.self_attention(qkv, heads, key_mask, attention.by_autodiff), wide(qkv)
    )
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for forward, backward in (
        (attention_short.forward, attention_short.backward),
        (attention_gpu.forward_of_parts, attention_gpu.backward_of_parts),
    ):
        out, log_sum = forward(size, qkv, key_mask, interpret=True)
        assert relative(out, expected) < tolerance
        gradient = backward(size, qkv, key_mask, out, log_sum, g, interpret=True)
        if backward is attention_short.backward:
            gradient, sums = gradient
            assert sums.dtype == jnp.float32 and relative(sums, jnp.sum(vjp(wide(g))[0], axis=1)) < tolerance
        assert gradient.dtype == dtype and relative(gradient, vjp(wide(g))[0]) < tolerance


@pytest.mark.parametrize("attend", [attention.attention, attention.by_autodiff])
def test_a_bias_gets_its_gradient_of_who_reads_what_it_was_added_to(attend):
    rng = np.random.default_rng(0)
    qkv, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 32, 3, 48), (3, 48)))
    handed_out = layers.Dense((3, 48), 3 * ("embed",), numerics.Arithmetic(jnp.float32), hands_out_bias=True)

    def loss(bias):
        read, bias = handed_out.apply({"params": {"kernel": jnp.eye(144).reshape(144, 3, 48), "bias": bias}}, wide_qkv)
        return jnp.sum(jnp.sin(attention.self_attention(read, 2, None, attend, bias)))

    wide_qkv = qkv.reshape(2, 32, 144)
    expected = jax.grad(lambda b: jnp.sum(jnp.sin(attention.self_attention(qkv + b, 2, None, attention.by_autodiff))))
    assert relative(jax.grad(loss)(bias), expected(bias)) < 1e-5


@pytest.mark.parametrize("dtype, calls", [(jnp.bfloat16, (2, 2, 0)), (jnp.float32, (2, 0, 0))], ids=str)
def test_few_tokens_take_the_kernels_of_the_platform(dtype, calls):
    """One kernel forward and one backward; a CPU, and a GPU in float32, keep what XLA makes of them."""
    qkv = jax.ShapeDtypeStruct((2, 256, 3, 144), dtype)
    function = jax.value_and_grad(lambda qkv: jnp.sum(attention.self_attention(qkv, 2).astype(jnp.float32)))
    for platform, count in zip(("tpu", "cuda", "cpu"), calls, strict=True):
        text = jax.jit(function).trace(qkv).lower(lowering_platforms=(platform,)).as_text()
        found = {name: text.count(f"custom_call @{name}") for name in ("tpu_custom_call", "__gpu$xla.gpu.triton")}
        assert found.pop("__gpu$xla.gpu.triton" if platform == "cuda" else "tpu_custom_call") == count
        assert not sum(found.values())


def test_sharded_attention_equals_that_of_one_device(monkeypatch):
    """Samples are split over two axes of the mesh, heads over the third; the devices exchange nothing."""
    monkeypatch.setattr(attention, "LEAST_KEYS_OF_KERNELS", 64)
    monkeypatch.setattr(attention, "_Blockwise", interpreted(attention_tpu))
    arguments, g = arrays(4, 130, 140, 2)
    axes = config_lib.default().mesh
    axes.update(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(axes)

    def gradients(q, k, v, key_mask, g):
        out, vjp = jax.vjp(lambda q, k, v: attention.attention(q, k, v, key_mask), q, k, v)
        return out, *vjp(g)

    expected = jax.jit(gradients)(*arguments, g)
    samples = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    tokens = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor"))
    placed = [jax.device_put(x, samples if x.dtype == bool else tokens) for x in (*arguments, g)]
    with sharding.use(mesh):
        compiled = jax.jit(lambda *args: gradients(*args)).lower(*placed).compile()
        found = compiled(*placed)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def gradient_of_attention(dtype=jnp.bfloat16, batch=2, tokens=2304, heads=2, size=128, policy=None):
    """The gradient of a loss of attention under a scan, rematerialised in every step, and its abstract arguments."""

    def step(x, _):
        return attention.attention(x, 2 * x, 3 * x, None), None

    def loss(x):
        x, _ = jax.lax.scan(jax.checkpoint(step, policy=policy, prevent_cse=False), x, length=3)
        return jnp.sum(x.astype(jnp.float32))

    return jax.grad(loss), jax.ShapeDtypeStruct((batch, tokens, heads, size), dtype)


@pytest.mark.parametrize("platform, word, passes", [("tpu", "tpu_custom_call", (1, 1)), ("cuda", "triton", (1, 2))])
def test_a_policy_that_keeps_dense_outputs_runs_no_kernel_twice(platform, word, passes):
    """Without it the forward pass runs once more."""
    forward, backward = passes
    for policy, runs in ((numerics.keep_dense_outputs, 1), (None, 2)):
        function, x = gradient_of_attention(policy=policy)
        text = jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert text.count(f"custom_call @{'tpu_custom_call' if platform == 'tpu' else '__gpu$xla.gpu.triton'}") == (
            runs * forward + backward
        )


@pytest.mark.parametrize(
    "tokens, size, dtype", [(1023, 128, "bfloat16"), (2304, 72, "float32"), (2304, 128, "float64")]
)
def test_elsewhere_attention_is_that_of_xla(tokens, size, dtype):
    """For few keys, for heads that are no whole lanes of a TPU, for float32 on GPUs, and in float64."""
    with jax.enable_x64(dtype == "float64"):
        x = jax.ShapeDtypeStruct((1, tokens, 2, size), dtype)
        function = jax.grad(lambda x: jnp.sum(attention.attention(x, x, x).astype(jnp.float32)))
        for platform in ("tpu", "cuda"):
            text = jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()
            assert "tpu_custom_call" not in text and "triton" not in text


def test_a_plain_model_has_forward_derivatives(monkeypatch):
    """Of attention over many keys; they equal those of reverse mode of the model with kernels' custom rule."""
    monkeypatch.setattr(attention, "LEAST_KEYS_OF_KERNELS", 8)
    monkeypatch.setattr(attention, "MOST_KEYS_AT_ONCE", 8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 16, 128)), jnp.float32)
    blocks = {plain: layers.Attention(1, numerics.Arithmetic.of(jnp.float32, plain=plain)) for plain in (True, False)}
    params = layers.nn.meta.unbox(blocks[True].init(jax.random.key(0), x))
    run = {plain: lambda x, block=block: jnp.sum(jnp.sin(block.apply(params, x))) for plain, block in blocks.items()}
    _, forward = jax.jvp(run[True], (x,), (jnp.cos(x),))
    np.testing.assert_allclose(forward, jnp.sum(jax.grad(run[False])(x) * jnp.cos(x)), rtol=1e-4)
    assert "custom_vjp" in str(jax.make_jaxpr(run[False])(x)) and "custom_vjp" not in str(jax.make_jaxpr(run[True])(x))


def test_declared_flops_are_those_of_the_products():
    """Forward two products of all queries with all keys, backward five on TPUs."""
    function, x = gradient_of_attention(policy=numerics.keep_dense_outputs)
    product = 2 * 2 * 2304**2 * 2 * 128
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    # On GPUs backward seven, because two kernels compute scores. By XLA six, because the softmax is divided by its sums
    # after the product with the values, and of queries padded to five blocks of 512.
    for platform, products in (("tpu", 7), ("cuda", 9), ("cpu", 8 * 2560 / 2304)):
        assert count_flops(jaxpr, platform) == pytest.approx(3 * product * products, rel=1e-3), platform


def test_blocks_waste_little(monkeypatch):
    monkeypatch.undo()
    for tokens in (4608, 4352, 7401):
        size = attention_tpu.block_size(tokens)
        assert size % 128 == 0 and 512 <= size <= 768
        assert -tokens % size < 0.06 * tokens


@needs_libtpu
def test_kernels_compile_for_a_tpu_and_declare_their_cost():
    printed = printed_with_libtpu("tests.models.test_attention", timeout=300)
    # Three steps of a loop, forward and backward; and once of few tokens, whose heads cross the lanes of a tile.
    assert printed == ["6", "0", "2", "0"]


def compile_for_v5e():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 1, "tensor": 2}), devices)
    function, x = gradient_of_attention(policy=numerics.keep_dense_outputs)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
    parts = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, None, "tensor"))
    with sharding.use(mesh):
        compiled = jax.jit(function).lower(x).compile()
        few = jax.ShapeDtypeStruct((8, 256, 3, 1152), x.dtype, sharding=parts)
        loss = lambda qkv: jnp.sum(attention.self_attention(qkv, 16).astype(jnp.float32))  # noqa: E731
        compiled_few = jax.jit(jax.value_and_grad(loss)).lower(few).compile()
    for one in (compiled, compiled_few):
        schedule = read_schedule(one.as_text(), CHIPS["v5e"])
        print(schedule.kernel_calls, schedule.undeclared_kernels)


if __name__ == "__main__":
    compile_for_v5e()
