"""The image encoders compute what transformers computes, know every form of the published weights, and keep them."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dar_jax import files, sharding
from dar_jax.errors import UserError
from dar_jax.pretrained import dino
from dar_jax.pretrained import dino_weights as weights_lib
from tests.parity import torch_dino
from tests.training import tiny

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
ALL = tuple(torch_dino.KINDS)


def images(count, height, width):
    return np.random.default_rng(0).normal(size=(count, height, width, 3)).astype(np.float32)


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def apply(model, params, x):
    return np.asarray(jax.jit(lambda params, x: model.apply({"params": params}, x))(params, x))


def small(kind):
    return torch_dino.make(kind, 128, 3)


def torch_resample(x, size, antialias):
    x = torch.as_tensor(x).movedim(-1, -3)
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=antialias, align_corners=False)
    return x.movedim(-3, -1).numpy()


def check_equals_transformers(kind, reference, x):
    encoder = weights_lib.from_torch(torch_dino.published(reference))
    model = encoder.model.clone(antialias=kind != "dinov2")
    actual, expected = apply(model, encoder.params, x), torch_dino.tokens(reference, x)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    print("relative error:", error := relative(actual, expected))
    assert error < 2e-5 and expected.std() > 0.1
    assert np.std(expected, axis=1).mean() > 0.1  # the tokens differ


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize("kind", ALL)
def test_tokens_of_published_sizes_equal_transformers(kind, size):
    check_equals_transformers(kind, torch_dino.make(kind, *torch_dino.SIZES[size]), images(1, 224, 224))


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [
        ("dinov2", 518, 518),  # the grid of the table
        ("dinov2", 98, 56),
        ("dinov2-registers", 518, 518),
        ("dinov2-registers", 56, 602),
        ("dinov3", 256, 256),
        ("dinov3", 64, 112),
    ],
)
def test_tokens_of_other_grids_equal_transformers(kind, height, width):
    check_equals_transformers(kind, small(kind), images(2, height, width))


@pytest.mark.parametrize("kind", ALL)
def test_tokens_of_faint_activations_equal_transformers(kind):
    """Where LayerNorm's epsilon, which differs between the versions, is as large as the variance."""
    reference = small(kind)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "embeddings" in name or "lambda" in name:
                parameter *= 1e-3
    check_equals_transformers(kind, reference, images(2, 112, 112))


@pytest.mark.parametrize("kind", ALL)
def test_all_names_are_the_same_weights(kind):
    reference = small(kind)
    first = weights_lib.from_torch(torch_dino.published(reference))
    meta = torch_dino.meta(reference)
    assert ("blocks.2.attn.qkv.bias_mask" in meta) == ("storage_tokens" in meta) == (kind == "dinov3")
    arrays = {name: tensor.float().numpy() for name, tensor in meta.items()}
    bare = {name: tensor for name, tensor in meta.items() if not re.search("mask|periods", name)}
    for names in (reference.state_dict(), meta, torch_dino.chunked(meta), arrays, bare):
        other = weights_lib.from_torch(names)
        assert other.model == first.model and other.fingerprint == first.fingerprint
        jax.tree.map(np.testing.assert_array_equal, other.params, first.params)
    meta["blocks.1.ls2.gamma"] += 1e-3
    assert weights_lib.from_torch(meta).fingerprint != first.fingerprint


@pytest.mark.parametrize("size", ["S", "B", "L"])
@pytest.mark.parametrize("kind", ALL)
def test_published_sizes_load(kind, size, monkeypatch):
    """By names and shapes alone: no array is filled, and the fingerprint is left out."""
    monkeypatch.setattr(weights_lib, "fingerprint", lambda params: "")
    width, depth = torch_dino.SIZES[size]
    reference = torch_dino.make(kind, width, depth, device="meta")
    for names in (torch_dino.published(reference), torch_dino.meta(reference)):
        views = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in names.items()}
        if "rope_embed.periods" in views:
            views["rope_embed.periods"] = names["rope_embed.periods"].float().numpy()
        with monkeypatch.context() as patch:
            patch.setattr(np, "ascontiguousarray", lambda x: x)
            patch.setattr(np, "stack", lambda xs: np.broadcast_to(np.float32(0), (len(xs), *xs[0].shape)))
            encoder = weights_lib.from_torch(views)
        abstract = sharding.unbox(jax.eval_shape(lambda: dino.initial(encoder.model)))  # noqa: B023
        assert jax.tree.map(np.shape, encoder.params) == jax.tree.map(np.shape, abstract)
        assert (encoder.model.hidden_size, encoder.model.depth) == (width, depth)
        assert encoder.model.num_registers == (0 if kind == "dinov2" else 4)
        assert encoder.model.num_heads == {"S": 6, "B": 12, "L": 16}[size]
        assert (encoder.model.patch_size, encoder.model.table_size) == ((16, 0) if kind == "dinov3" else (14, 37))


@pytest.mark.parametrize(
    ("kind", "names", "change", "message"),
    [
        ("dinov2", "meta", lambda d: d.pop("blocks.1.norm2.bias"), 'lack the key "blocks.1.norm2.bias"'),
        ("dinov2", "meta", lambda d: d.pop("pos_embed"), 'lack the key "pos_embed"'),
        ("dinov3", "meta", lambda d: d.pop("storage_tokens"), 'lack the key "storage_tokens"'),
        (
            "dinov3",
            "published",
            lambda d: d.pop("layer.1.attention.q_proj.bias"),
            'key "layer.1.attention.q_proj.bias"',
        ),
        ("dinov3", "published", lambda d: d.pop("embeddings.register_tokens"), 'key "embeddings.register_tokens"'),
        ("dinov2", "published", lambda d: d.pop("embeddings.patch_embeddings.projection.weight"), "projection.weight"),
        ("dinov2", "published", lambda d: d.update({"classifier.bias": np.zeros(4)}), 'have the key "classifier.bias"'),
        (
            "dinov3",
            "meta",
            lambda d: d.update({"local_cls_norm.bias": np.zeros(4)}),
            'key "local_cls_norm.bias", which',
        ),
        ("dinov3", "meta", lambda d: d.update({"rope_embed.periods": np.arange(16)}), '"rope_embed.periods" differs'),
        ("dinov2", "meta", lambda d: d.update({"norm.bias": np.zeros(64)}), r'"norm.bias" has shape \(64,\), but'),
        (
            "dinov2",
            "meta",
            lambda d: d.update({"pos_embed": np.zeros((1, 100, 128))}),
            r'"pos_embed" has shape \(1, 100',
        ),
        ("dinov2", "meta", lambda d: d.update({"patch_embed.proj.weight": np.zeros((96, 3, 14, 14))}), "width 96"),
        ("dinov2", "meta", lambda d: d.update({"patch_embed.proj.weight": np.zeros((128, 588))}), "not of rank 4"),
        ("dinov2", "meta", lambda d: d.update({"blocks.0.mlp.w12.weight": np.zeros((4, 4))}), "gated MLP"),
        ("dinov2", "published", lambda d: d.update({"encoder.layer.0.mlp.weights_in.bias": np.zeros(4)}), "gated MLP"),
        ("dinov3", "published", lambda d: d.update({"layer.0.mlp.gate_proj.bias": np.zeros(4)}), "gated MLP"),
        ("dinov3", "meta", lambda d: d.update({"blocks.0.mlp.w1.bias": np.zeros(4)}), "gated MLP"),
        (
            "dinov2",
            "meta",
            lambda d: (d.clear(), d.update({"x_embedder.proj.bias": np.zeros(4)})),
            "of DINOv2 and DINOv3",
        ),
    ],
)
def test_wrong_weights_are_named(kind, names, change, message):
    state_dict = getattr(torch_dino, names)(torch_dino.make(kind, 128, 2))
    change(state_dict)
    with pytest.raises(UserError, match=message) as error:
        weights_lib.from_torch(state_dict)
    assert "\n" not in str(error.value)


def test_what_no_patch_needs_is_dropped():
    state_dict = torch_dino.published(torch_dino.make("dinov2", 128, 2))
    first = weights_lib.from_torch(state_dict)
    surplus = {"embeddings.position_ids": torch.arange(9), "pooler.dense.weight": torch.zeros(3, 3)}
    assert weights_lib.from_torch(state_dict | surplus).fingerprint == first.fingerprint
    del state_dict["embeddings.mask_token"]
    assert weights_lib.from_torch(state_dict).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(256, 256, 224), (97, 97, 224), (301, 301, 224), (28, 28, 56), (224, 224, 224), (99, 40, 70)],
)
def test_preprocessing_equals_pytorch(height, width, size):
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    x = (torch.tensor(pixels) / 255 - MEAN) / STD
    expected = torch_resample(x, (size, size), antialias=False)
    actual = np.asarray(jax.jit(dino.preprocess, static_argnums=1)(pixels / np.float32(127.5) - 1, size))
    print("largest error:", np.abs(actual - expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("grid", [(16, 16), (37, 37), (7, 50), (1, 1)])
def test_table_of_positions_equals_pytorch(grid, antialias):
    table = np.random.default_rng(0).normal(size=(1, 37, 37, 24)).astype(np.float32)
    actual = np.asarray(jax.jit(lambda x: dino.resample(x, grid, antialias))(table))
    expected = torch_resample(table, grid, antialias)
    print("largest error:", np.abs(actual - expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_features_are_tokens_of_resized_images(kind):
    """As REPA computes them: the table of positions is smoothed also without registers."""
    reference = torch_dino.make(kind, 128, 2)
    encoder = weights_lib.from_torch(torch_dino.published(reference))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 80, 64, 3)).astype(np.float32)
    grid, side = 4, 4 * encoder.model.patch_size
    if kind == "dinov2":
        table = reference.embeddings.position_embeddings
        resampled = torch_resample(table[0, 1:].detach().reshape(1, 37, 37, -1), (grid, grid), antialias=True)
        resampled = torch.tensor(resampled).reshape(1, grid * grid, -1)
        reference.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[:, :1], resampled], dim=1))
    resized = torch_resample(((torch.tensor(x) + 1) / 2 - MEAN) / STD, (side, side), antialias=False)
    expected = torch_dino.tokens(reference, resized)
    actual = jax.jit(dino.features, static_argnums=(0, 3))(encoder.model, encoder.params, x, grid)
    assert actual.shape == (2, 16, 128)
    assert relative(actual, expected) < 2e-5


@pytest.mark.parametrize("kind", ALL)
def test_bfloat16_is_close(kind):
    encoder = weights_lib.from_torch(torch_dino.published(small(kind)))
    x = images(2, 112, 112)
    coarse = encoder.model.clone(dtype=jnp.bfloat16)
    actual, expected = apply(coarse, encoder.params, x), apply(encoder.model, encoder.params, x)
    assert actual.dtype == np.float32
    print("relative error:", error := relative(actual, expected))
    assert 1e-4 < error < 3e-2


def test_float32_is_multiplied_at_full_precision():
    """On TPUs and GPUs a float32 product is rounded to fewer bits unless it is asked for."""
    encoder = weights_lib.from_torch(torch_dino.published(small("dinov3")))
    x = images(1, 32, 32)

    def products(dtype):
        """How many there are, and how many at full precision."""
        model = encoder.model.clone(dtype=dtype)
        text = str(jax.make_jaxpr(lambda x: dino.features(model, encoder.params, x, 2))(x))
        return text.count("dot_general["), text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")

    assert products(jnp.float32) == (9, 9)  # two of resizing, one of patches, six of a block
    assert products(jnp.bfloat16) == (9, 2)


def test_softmax_and_statistics_are_float32_in_bfloat16():
    encoder = weights_lib.from_torch(torch_dino.published(small("dinov3")))
    model = encoder.model.clone(dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: model.apply({"params": encoder.params}, x))(images(1, 32, 32)))
    dtypes = re.findall(r":(\w+)\[[\d,]*\] = (exp|rsqrt) ", text)
    assert sorted(dtypes) == [("f32", "exp")] + 3 * [("f32", "rsqrt")]


def convert(kind, weights, out):
    command = [sys.executable, "-m", "dar_jax.convert", f"--kind={kind}", f"--input={weights}", f"--output={out}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_door_writes_a_directory_that_is_read_back(tmp_path):
    state_dict = torch_dino.published(small("dinov2-registers"))
    weights, out = tmp_path / "model.safetensors", tmp_path / "dinov2"
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, weights)
    done = convert("dinov2", weights, out)
    assert done.returncode == 0, done.stderr
    expected, encoder = weights_lib.from_torch(state_dict), weights_lib.load(str(out), "--encoder")
    assert encoder.model == expected.model == weights_lib.build(weights_lib.read_header(str(out), "--encoder"))
    assert encoder.fingerprint == expected.fingerprint in done.stdout
    assert "DINOv2 of 3 blocks x 128, 2 heads, patch 14, 4 registers" in done.stdout
    jax.tree.map(np.testing.assert_array_equal, encoder.params, expected.params)

    again = convert("dinov2", weights, out)
    assert again.returncode == 2 and "holds an encoder; take another" in again.stderr
    wrong = convert("dinov3", weights, tmp_path / "other")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "the weights are those of dinov2; set --kind=dinov2" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_door_takes_a_file_of_meta(tmp_path):
    state_dict = torch_dino.meta(torch_dino.make("dinov3", 64, 1))
    torch.save(state_dict, tmp_path / "dinov3.pth")
    done = convert("dinov3", tmp_path / "dinov3.pth", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    loaded = weights_lib.load(str(tmp_path / "out"), "--encoder")
    assert loaded.fingerprint == weights_lib.from_torch(state_dict).fingerprint
    wrong = convert("dinov2", tmp_path / "dinov3.pth", tmp_path / "other")
    assert wrong.returncode == 2 and "set --kind=dinov3" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_damage_is_found(tmp_path):
    out = str(tmp_path / "encoder")
    weights_lib.write(out, weights_lib.from_torch(torch_dino.published(torch_dino.make("dinov3", 64, 1))))
    target = sharding.abstract(tiny.make_mesh(1, 1), lambda: dino.initial(weights_lib.load(out, "--encoder").model))
    header = tmp_path / "encoder" / "encoder.json"
    whole = header.read_text()

    changed = files.unseal(json.loads(whole)) | {"fingerprint": "0" * 64}
    files.write_json(header, files.seal(changed))
    for read in (weights_lib.load, lambda *args: weights_lib.load_params(*args, target)):
        with pytest.raises(UserError, match=r"--encoder = .* not those of encoder\.json"):
            read(out, "--encoder")
    header.write_text(whole.replace('"depth": 1', '"depth": 2'))
    with pytest.raises(UserError, match="its checksum differs"):
        weights_lib.read_header(out, "--encoder")
    header.write_text(json.dumps(files.unseal(json.loads(whole)) | {"depth": 2}))
    with pytest.raises(UserError, match=r"not those of encoder\.json"):
        weights_lib.load(out, "--encoder")
    header.write_text(whole)
    largest = max((tmp_path / "encoder" / "weights").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"the weights (cannot be read|are not those)"):
        weights_lib.load(out, "--encoder")
    with pytest.raises(UserError, match=r"encoder\.json. cannot be read .*config\.x must be .*--kind=dinov2"):
        weights_lib.load(str(tmp_path), "config.x")


@pytest.mark.parametrize("mesh_shape", [(2, 4), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_sharded_weights_give_the_same_tokens(tmp_path, kind, mesh_shape):
    out = str(tmp_path / "encoder")
    encoder = weights_lib.from_torch(torch_dino.published(small(kind)))
    weights_lib.write(out, encoder)
    model, mesh = weights_lib.build(weights_lib.read_header(out, "--encoder")), tiny.make_mesh(*mesh_shape)
    x = np.random.default_rng(0).uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32)
    with sharding.use(mesh):
        target = sharding.abstract(mesh, lambda: dino.initial(model))
        params = weights_lib.load_params(out, "--encoder", target)
        batch = jax.device_put(x, sharding.batch_sharding(mesh))
        actual = jax.jit(dino.features, static_argnums=(0, 3))(model, params, batch, 4)
    kernel = params["blocks"]["mlp_1"]["kernel"]
    assert kernel.shape == (3, 128, 512)
    tensor = mesh.shape["tensor"]
    assert kernel.addressable_shards[0].data.shape == (3, 128 // mesh.shape["fsdp"], 512 // tensor)
    assert params["blocks"]["attention"]["qkv"]["kernel"].addressable_shards[0].data.shape[-1] == 128 // tensor
    assert actual.addressable_shards[0].data.shape[0] == 8 // sharding.batch_shards(mesh)
    expected = jax.jit(dino.features, static_argnums=(0, 3))(model, encoder.params, x, 4)
    assert relative(actual, expected) < 1e-5


def test_weights_are_kept_in_the_dtype_that_is_asked_for(tmp_path):
    out, mesh = str(tmp_path / "encoder"), tiny.make_mesh(1, 2)
    encoder = weights_lib.from_torch(torch_dino.published(torch_dino.make("dinov3", 64, 1)))
    weights_lib.write(out, encoder)
    target = sharding.abstract(mesh, lambda: dino.initial(encoder.model))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), target)
    params = weights_lib.load_params(out, "--encoder", target)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert params["prefix"].sharding == target["prefix"].sharding
