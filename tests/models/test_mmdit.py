"""The MM-DiT against diffusers' Qwen-Image, and its routed streams against an unrolled PyTorch reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from dar_jax import config as config_lib
from dar_jax import sharding
from dar_jax.diagnosis.forward import forward
from dar_jax.errors import UserError
from dar_jax.models import attention, layers
from dar_jax.models.mmdit import SIZES, MMDiT, pack, unpack
from dar_jax.models.numerics import Arithmetic
from dar_jax.pretrained import qwen_image
from dar_jax.routing import QUERIES, Layout, keeps_function, warm_start_streams
from tests.parity import torch_mmdit

CHANNELS, TEXT_SIZE, LENGTHS = 4, 12, (6, 2, 4)
TINY = {
    "channels": CHANNELS,
    "patch_size": 2,
    "hidden_size": 48,
    "num_heads": 3,
    "text_size": TEXT_SIZE,
    "rope_axes": (8, 4, 4),
    **{"input_size": 4, "text_length": 6, "num_words": 9, "text_depth": 1},
}
TEXT_OUT_OF_LAST_BLOCK = ("to_add_out", "txt_mlp", "norm_added_q", "add_q_proj")


def model_of(depth=2, layout=None, query="static", streams="image", dtype="float32", remat="block", **fields):
    fields = {**TINY, **fields}
    routing = {"layout": layout, "query": QUERIES[query], "streams": streams, "implementation": "auto"}
    return MMDiT(**fields, depth=depth, dtype=jnp.dtype(dtype), remat=remat, **routing)


def inputs_of(grid, lengths=LENGTHS, seed=0):
    """x_t, t and a condition of prompts of unlike lengths; padding holds what must have no influence."""
    rng = np.random.default_rng(seed)
    x_t = rng.normal(size=(len(lengths), 2 * grid[0], 2 * grid[1], CHANNELS))
    text = rng.normal(size=(len(lengths), max(lengths), TEXT_SIZE))
    t = np.array([0.25, 0.8125, 0.5])[: len(lengths)]
    return x_t, t, {"text": text, "mask": np.arange(max(lengths)) < np.array(lengths)[:, None]}


def single(tree):
    """Arrays in the type of the current test: float32, or float64 where that is enabled."""
    return jax.tree.map(lambda a: jnp.asarray(a, None if a.dtype == bool else jnp.asarray(0.0).dtype), tree)


def abstract_params(model, grid=(2, 2)):
    x_t, t, condition = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), single(inputs_of(grid)))
    x_t = jax.ShapeDtypeStruct((*x_t.shape[:3], model.channels), x_t.dtype)
    condition["text"] = jax.ShapeDtypeStruct((*condition["text"].shape[:2], model.text_size), x_t.dtype)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x_t, t, condition)["params"])


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@functools.cache
def reference(depth):
    """diffusers' own model with random weights, also where ours starts at zero."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=depth,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_SIZE,
        axes_dims_rope=(8, 4, 4),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm_" in name and p.ndim == 1 else 0.8 * noise / max(1, p[0].numel()) ** 0.5)
    return model


def published_order(x):
    """[B, H, W, C] -> [B, T, 4 C] as diffusers' pipeline packs latents."""
    b, h, w, c = x.shape
    x = x.permute(0, 3, 1, 2).reshape(b, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


@pytest.mark.parametrize(("grid", "depth", "remat"), [((5, 7), 2, "block"), ((4, 3), 3, "dense")], ids=str)
def test_outputs_and_gradients_equal_diffusers(grid, depth, remat):
    """For prompts of unlike lengths. The velocity x1 - x0 at t is minus the published output at sigma = 1 - t."""
    x_t, t, condition = inputs_of(grid)
    probe = np.random.default_rng(1).normal(size=x_t.shape)

    torch_model = reference(depth)
    torch_model.zero_grad()
    torch_x, torch_text = (torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (x_t, condition["text"]))
    expected = -torch_model(
        hidden_states=published_order(torch_x),
        encoder_hidden_states=torch_text,
        encoder_hidden_states_mask=torch.tensor(condition["mask"]),
        timestep=torch.tensor(1 - t, dtype=torch.float32),
        img_shapes=[[(1, *grid)]] * len(t),
        return_dict=False,
    )[0]
    torch.sum(expected * published_order(torch.tensor(probe, dtype=torch.float32))).backward()

    params = qwen_image.params_from_torch(torch_model.state_dict())
    model = model_of(depth, remat=remat)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract_params(model))
    x_t, t, condition = single((x_t, t, condition))

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x_t, text):
        prediction = model.apply({"params": params}, x_t, t, {**condition, "text": text}).prediction
        return jnp.sum(prediction * probe), prediction

    (_, prediction), (d_params, d_x, d_text) = jax.jit(loss)(params, x_t, condition["text"])
    errors = {
        "prediction": relative(pack(prediction, 2), expected.detach().numpy()),
        "x_t": relative(d_x, torch_x.grad.numpy()),
        "text": relative(d_text, torch_text.grad.numpy()),
    }
    assert not np.any(d_text[~np.asarray(condition["mask"])])
    found = qwen_image.params_to_torch(d_params)
    whole = np.sqrt(sum(float(torch.sum(p.grad**2)) for p in torch_model.parameters() if p.grad is not None))
    for name, p in torch_model.named_parameters():
        is_unread = name.startswith(f"transformer_blocks.{depth - 1}.") and any(
            word in name for word in TEXT_OUT_OF_LAST_BLOCK
        )
        assert np.any(found[name]) != is_unread, name
        if not is_unread:
            # A bias of keys moves all scores of a query alike where nothing turns them; its gradient may be small.
            size = max(float(torch.linalg.norm(p.grad)), 1e-3 * whole)
            errors[name] = float(np.linalg.norm(found[name] - p.grad.numpy())) / size
    worst = max(errors, key=errors.get)
    print(f"largest relative error {errors[worst]:.1e} of {worst}; prediction {errors['prediction']:.1e}")
    assert errors[worst] < 1e-5, (worst, errors[worst])


ROUTED = [  # query, layout, streams, hidden_at, and the form that the quick tests run
    ("static", Layout(2, 1), "both", (1,), "dense"),
    ("static_t", Layout(4, 2, "sum"), "both", (3, 1), "block"),
    ("dynamic", Layout(3, 2, final="shared"), "image", (2,), "plain"),
    ("dynamic", Layout(4, 4), "both", (3,), None),
    ("static", Layout(3, 6, "last", "summaries"), "both", (), None),
    ("static_t", Layout(3, 1, final="shared"), "image", (1, 2), None),
]
FORMS = [  # fused with the two kinds of remat, or plain
    pytest.param(*case, form, marks=() if form == quick else pytest.mark.slow)
    for *case, quick in ROUTED
    for form in ("plain", "dense", "block")
]
NARROW = {"hidden_size": 16, "num_heads": 2, "rope_axes": (4, 2, 2)}


@pytest.mark.parametrize(("query", "layout", "streams", "hidden_at", "form"), FORMS, ids=str)
def test_routed_streams_equal_an_unrolled_reference(query, layout, streams, hidden_at, form):
    """Predictions, hidden states and gradients of all parameters, of x_t and of the text, in float64."""
    with jax.enable_x64(True):
        grid, rng = (2, 3), np.random.default_rng(3)
        remat = "block" if form == "plain" else form
        model = model_of(layout.depth, layout, query, streams, "float64", remat, **NARROW, plain=form == "plain")
        shapes = abstract_params(model)
        params = jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape)), shapes)
        x_t, t, condition = single(inputs_of(grid, (4, 2)))
        probe = rng.normal(size=x_t.shape)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
        def gradients(params, x_t, text):
            output = model.apply({"params": params}, x_t, t, {**condition, "text": text}, hidden_at=hidden_at)
            return jnp.sum(output.prediction * probe) + sum(jnp.sum(jnp.sin(h)) for h in output.hidden), output

        (d_params, d_x, d_text), output = gradients(params, x_t, condition["text"])
        embedder = layers.TimestepEmbedder(16, False, Arithmetic(jnp.dtype("float64")))
        e_t, vjp = jax.vjp(lambda p: embedder.apply({"params": p}, 1000 * (1 - t)), params["timestep"])

        theirs = {name: p for name, p in params.items() if name != "timestep"}
        theirs["e_t"], theirs["tokens"], theirs["words"] = e_t, pack(x_t, 2), condition["text"]
        theirs = jax.tree.map(lambda p: torch.tensor(np.asarray(p), requires_grad=True), theirs)
        predicted, entered = torch_mmdit.mmdit(
            theirs, layout, query, 2, (4, 2, 2), theirs["tokens"], grid, theirs["words"],
            torch.tensor(np.asarray(condition["mask"])), theirs["e_t"],
        )  # fmt: skip
        total = torch.sum(predicted * torch.tensor(np.asarray(pack(probe, 2))))
        (total + sum(torch.sin(entered[k]).sum() for k in hidden_at)).backward()

        errors = {"prediction": relative(pack(output.prediction, 2), predicted.detach().numpy())}
        for k, hidden in zip(hidden_at, output.hidden, strict=True):
            errors[f"hidden_{k}"] = relative(hidden, entered[k].detach().numpy())
        expected = jax.tree.map(lambda p: np.zeros(p.shape) if p.grad is None else p.grad.numpy(), theirs)
        found = {**d_params, "tokens": pack(d_x, 2), "words": d_text}
        expected["timestep"] = vjp(jnp.asarray(expected.pop("e_t")))[0]
        whole = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected)))
        for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            errors[jax.tree_util.keystr(path)] = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * whole)
    worst = max(errors, key=errors.get)
    print(f"largest relative error {errors[worst]:.1e} of {worst}; prediction {errors['prediction']:.1e}")
    assert errors[worst] < 1e-9, (worst, errors[worst])

    aggregators = {name: p for name, p in d_params["stack"].items() if name.endswith("_query")}
    counts = {"image_query": 2 * layout.depth, "text_query": 2 * layout.depth - 1, "final_query": None}
    absent = ({"final_query"} if layout.final == "shared" else set()) | (
        {"text_query"} if streams == "image" else set()
    )
    assert set(aggregators) == set(counts) - absent
    for name, parameters in aggregators.items():
        for g in jax.tree.leaves(parameters):
            if name == "final_query":
                assert np.any(g)
            else:  # the first aggregator has one source, which it takes whatever its query is
                assert len(g) == counts[name] and not np.any(np.abs(g[0]) > 1e-12)
                assert np.all(np.any(g[1:], axis=tuple(range(1, g.ndim)))), name


@pytest.mark.parametrize("streams", [None, "both"])
def test_a_batch_of_mixed_lengths_equals_the_single_runs(streams):
    """Without padding, whatever padding holds."""
    layout = streams and Layout(2, 2)
    model = model_of(2, layout, "dynamic", streams or "image")
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), abstract_params(model))
    apply = jax.jit(lambda x_t, t, condition: model.apply({"params": params}, x_t, t, condition).prediction)
    lengths = 5, 2
    x_t, t, condition = single(inputs_of((3, 2), lengths))
    together = apply(x_t, t, condition)
    for i, length in enumerate(lengths):
        alone = {name: a[i : i + 1, :length] for name, a in condition.items()}
        assert relative(together[i : i + 1], apply(x_t[i : i + 1], t[i : i + 1], alone)) < 1e-5


def temp_bytes(depth, streams, remat):
    """Temporaries of a gradient of a fused model."""
    model = model_of(depth, Layout(depth, 4, "sum"), "static_t", streams, remat=remat)
    x_t, t, condition = single(inputs_of((8, 8), (16, 9, 12)))
    loss = lambda params: jnp.sum(model.apply({"params": params}, x_t, t, condition).prediction)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(abstract_params(model)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "remat"), [("both", "block"), ("image", "dense")])
def test_gradient_memory_is_linear_in_depth(streams, remat):
    """Temporaries at depths 4, 8, 16: the second doubling may add at most 2.3 times what the first added."""
    small, middle, large = (temp_bytes(depth, streams, remat) for depth in (4, 8, 16))
    print(small, middle, large)
    assert large - middle < 2.3 * (middle - small), (small, middle, large)


WARM = [
    ("static_t", Layout(2, 1), "image"),
    ("static_t", Layout(2, 2, "sum"), "both"),
    pytest.param("dynamic", Layout(2, 2, "sum", "shared"), "image", marks=pytest.mark.slow),
    ("static_t", Layout(2, 2), "both"),
]


@pytest.mark.parametrize(("query", "layout", "streams"), WARM, ids=str)
def test_warm_start_keeps_the_function(query, layout, streams):
    """Of a residual model with random weights, whose e(t) is not zero; not with summaries by the last output."""
    rng = np.random.default_rng(4)
    shapes = abstract_params(model_of(2))
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
    inputs = single(inputs_of((3, 2)))
    routed = model_of(2, layout, query, streams)
    warm = warm_start_streams(params, layout, routed.query, streams)
    assert jax.tree.map(jnp.shape, warm) == jax.tree.map(jnp.shape, abstract_params(routed))

    def predict(model, params):
        return jax.jit(lambda params: model.apply({"params": params}, *inputs).prediction)(params)

    error = relative(predict(routed, warm), predict(model_of(2), params))
    print(f"relative error {error:.1e}")
    assert error < 1e-5 if keeps_function(layout) else error > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["image", "both"])
def test_a_sharded_model_computes_the_same(streams):
    """Prediction and gradients on eight devices; the tensor axis does not divide the numbers of tokens."""
    model = model_of(2, Layout(2, 2, "sum"), "dynamic", streams, "float64", **NARROW)
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape)), abstract_params(model))
        x_t, t, condition = single(inputs_of((3, 1), (5, 2)))
        x_t, t, condition = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x_t, t, condition))

        def loss(params, x_t, t, condition):
            prediction = model.apply({"params": params}, x_t, t, condition).prediction
            return jnp.sum(jnp.sin(prediction)), prediction

        gradients = lambda *args: jax.jit(jax.grad(loss, has_aux=True))(*args)  # noqa: E731
        expected = gradients(params, x_t, t, condition)
        axes = config_lib.default().mesh
        axes.update(data=2, fsdp=2, tensor=2)
        mesh = sharding.make_mesh(axes)
        with sharding.use(mesh):
            batch = jax.device_put((x_t, t, condition), sharding.batch_sharding(mesh))
            found = gradients(params, *batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_what_does_not_fit_is_refused():
    def refused(message, hidden_at=(), channels=CHANNELS, **fields):
        model = model_of(**{"text_size": TEXT_SIZE, **fields})
        x_t, t, condition = single(inputs_of((2, 2)))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda: model.init(jax.random.key(0), x_t[..., :channels], t, condition, hidden_at=hidden_at)
            )

    refused("the depth less one", hidden_at=(2,))
    refused("must add up to 48 / 3", rope_axes=(8, 8, 8))
    refused("must have 4 channels", channels=3)
    refused("multiples of 3", patch_size=3)
    refused("not text_size = 13", text_size=13)
    refused('"text" must be one of', streams="text")


def test_published_weights_fit_and_return():
    """All tensors of the published model by shape alone; a small model's bit for bit."""
    published = MMDiT(
        **{**TINY, **SIZES["qwen_image"], "channels": 16, "rope_axes": None},
        dtype=jnp.dtype("bfloat16"), remat="block",
        layout=None, query=QUERIES["static"], streams="image", implementation="auto",
    )  # fmt: skip
    params = abstract_params(published)
    assert sum(p.size for p in jax.tree.leaves(params)) == 20_430_401_088
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel(num_layers=60).state_dict()
    assert sorted(theirs) == sorted(qwen_image.names(60)) and len(theirs) == 60 * 32 + 13
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="/"): p.shape for k, p in jax.tree.leaves_with_path(params)
    }
    for name, tensor in theirs.items():
        path, block, transposed = qwen_image.place(name)
        shape = leaves[path] if block is None else leaves[path][1:]
        assert tuple(tensor.shape) == (shape[::-1] if transposed else shape), name
    assert {qwen_image.place(name).path for name in theirs} == set(leaves)

    state_dict = reference(3).state_dict()
    back = qwen_image.params_to_torch(qwen_image.params_from_torch(state_dict))
    assert sorted(back) == sorted(state_dict)
    for name, tensor in state_dict.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())

    with pytest.raises(UserError, match=r"lack the key .transformer_blocks.1.attn.to_v.bias"):
        qwen_image.params_from_torch(
            {k: v for k, v in state_dict.items() if k != "transformer_blocks.1.attn.to_v.bias"}
        )
    for wrong in ("pos_embed.weight", "txt_norm.bias", "transformer_blocks.0.attn.to_out.1.weight", "img_in"):
        with pytest.raises(UserError, match="which Qwen-Image has not"):
            qwen_image.place(wrong)


def test_blockwise_attention_equals_the_plain_one():
    """Outputs and gradients, for a number of queries that the block does not divide."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 4)), jnp.float32) for n in (11, 9, 9))
    mask = jnp.asarray(np.arange(9) % 7 < np.array([[7], [3]]))

    def loss(attend, q, k, v):
        out = attend(q, k, v, mask)
        return jnp.sum(jnp.sin(out)), out

    def run(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))(q, k, v)

    plain, blockwise = run(attention.plain), run(functools.partial(attention.blockwise, size=4))
    for a, b in zip(jax.tree.leaves(blockwise), jax.tree.leaves(plain), strict=True):
        assert relative(a, b) < 1e-5


def test_long_sequences_take_blocks(monkeypatch):
    """No array of all scores is made, forward or backward."""
    monkeypatch.setattr(attention, "MOST_KEYS_AT_ONCE", 8)
    monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 4)
    q = jnp.ones((1, 12, 2, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attention.attention(q, q, q))))(q))
    assert "1,2,4,12" in text and "1,2,12,12" not in text and "3,1,2,4,12" not in text  # not as a stack either


def test_packing_has_an_inverse():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(unpack(pack(x, 2), 2, (2, 3)), x)


@pytest.mark.parametrize("layout", [None, Layout(2, 1, "sum", "shared"), Layout(2, 2, "last", "dedicated")], ids=str)
def test_the_diagnosis_sees_the_image_stream(layout):
    """What readers read is what sources and weights make; a tap moves the prediction as its reader would."""
    model = model_of(2, layout, "static_t", "both")
    x_t, t, condition = single(inputs_of((2, 3)))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x_t, t, condition)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), params)
    prediction, reads = forward(model, params, x_t, t, condition)
    whole = model.apply({"params": params}, x_t, t, condition, hidden_at=(1,))
    np.testing.assert_allclose(prediction, whole.prediction, atol=2e-5)
    np.testing.assert_allclose(reads.states[2], whole.hidden[0], atol=2e-5)
    if layout is None:
        np.testing.assert_allclose(reads.states, np.cumsum(reads.outputs, axis=0), atol=1e-5)
        assert reads.weights is None
    else:
        np.testing.assert_allclose(reads.weights.sum(axis=1), 1, atol=1e-5)
        made = np.einsum("lkbt,kbtd->lbtd", reads.weights, reads.outputs)
        is_made = [0, 1, 2, 3, 4] if layout.summary == "last" or layout.chunk_size == 1 else []
        np.testing.assert_allclose(made[is_made], reads.states[jnp.array(is_made)], atol=2e-5)
    taps = jnp.zeros_like(reads.states).at[-1].set(1.0)  # a constant, which the head's norm takes away
    np.testing.assert_allclose(forward(model, params, x_t, t, condition, taps)[0], prediction, atol=2e-5)
    moved = forward(model, params, x_t, t, condition, taps.at[1, ..., 0].set(1.0))[0]
    assert np.abs(moved - prediction).max() > 1e-4
