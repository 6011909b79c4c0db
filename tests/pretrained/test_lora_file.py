"""Files of adapters: diffusers reads ours and computes the same, and ours are read from theirs, gradients included."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dar_jax.errors import UserError
from dar_jax.models import lora
from dar_jax.models.mmdit import pack
from dar_jax.pretrained import lora_file, qwen_image
from tests.models.test_mmdit import inputs_of, model_of, published_order, reference, relative, single

GRID, DEPTH = (4, 3), 2
PLACES = lora_file.places("mmdit", DEPTH, 1)
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "net.0.proj",
    "net.2",
]


@pytest.fixture
def torch_model():
    """diffusers' own model with random weights, without adapters."""
    model = reference(DEPTH)
    reference.cache_clear()  # adapters change it
    return model


def base_of(torch_model):
    return qwen_image.params_from_torch(torch_model.state_dict())


def shapes(base):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(base, sep="/").items()}


def random_trained(base, rank):
    """A and B of all default targets, none of them zero."""
    rng, leaves = np.random.default_rng(7), {}
    for path, shape in shapes(base).items():
        if path.startswith("stack/") and path.endswith("kernel") and "adaln" not in path:
            layer = path.removesuffix("kernel")
            leaves[f"{layer}lora_a"] = np.float32(0.3 * rng.normal(size=(DEPTH, shape[1], rank)))
            leaves[f"{layer}lora_b"] = np.float32(0.3 * rng.normal(size=(DEPTH, rank, shape[2])))
    return traverse_util.unflatten_dict(leaves, sep="/")


def published(torch_model):
    """The prediction of diffusers, for prompts of unlike lengths."""
    x_t, t, condition = inputs_of(GRID)
    text, x_t, t = (torch.tensor(a, dtype=torch.float32) for a in (condition["text"], x_t, 1 - t))
    return -torch_model(
        hidden_states=published_order(x_t),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.tensor(condition["mask"]),
        timestep=t,
        img_shapes=[[(1, *GRID)]] * len(t),
        return_dict=False,
    )[0]


def ours(base, trained, scale):
    model, given = model_of(DEPTH), single(inputs_of(GRID))
    apply = jax.jit(lambda trained: model.apply({"params": lora.assemble(base, trained, scale)}, *given).prediction)
    return np.asarray(pack(apply(trained), 2))


def test_diffusers_reads_what_is_written(torch_model, tmp_path):
    """With an alpha that is not the rank, from the file's header."""
    base = base_of(torch_model)
    trained = random_trained(base, 3)
    without = published(torch_model).detach().numpy()
    path = lora_file.write(str(tmp_path), trained, PLACES, alpha=1.5)
    keys = load_file(path)
    assert keys["transformer.transformer_blocks.1.attn.to_out.0.lora_A.weight"].shape == (3, 48)
    assert keys["transformer.transformer_blocks.0.txt_mlp.net.0.proj.lora_B.weight"].shape == (192, 3)
    assert len(keys) == 2 * 12 * DEPTH
    torch_model.load_lora_adapter(str(tmp_path), weight_name=lora_file.ADAPTERS)
    found = published(torch_model).detach().numpy()
    error, change = relative(ours(base, trained, 0.5), found), relative(without, found)
    print(f"relative error {error:.1e}; the adapters change the output by {change:.1e}")
    assert error < 1e-5 and change > 1e-2
    back, scale = lora_file.read(path, PLACES, shapes(base))
    jax.tree.map(np.testing.assert_array_equal, back, trained)
    assert scale == 0.5


def saved_and_read(torch_model, base, tmp_path):
    """Fills the adapters of peft in `torch_model` with noise, and reads what diffusers saves of them."""
    generator = torch.Generator().manual_seed(1)
    for name, p in torch_model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    torch_model.save_lora_adapter(str(tmp_path), weight_name=lora_file.ADAPTERS)
    trained, scale = lora_file.read(str(tmp_path / lora_file.ADAPTERS), PLACES, shapes(base))
    return trained, scale


def test_adapters_of_peft_are_read(torch_model, tmp_path):
    """Saved by diffusers with ranks and alphas that differ by layer; output and gradients of A and B are equal."""
    base = base_of(torch_model)
    settings = {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_q": 2.0, "img_mlp.net.2": 6.0}}
    torch_model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **settings))
    trained, scale = saved_and_read(torch_model, base, tmp_path)
    expected = published(torch_model)
    assert relative(ours(base, trained, scale), expected.detach().numpy()) < 1e-5


def test_gradients_equal_those_of_peft(torch_model, tmp_path):
    """Of A and B, with alpha = 2 r, so that training by ours is training by peft."""
    base = base_of(torch_model)
    torch_model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    trained, scale = saved_and_read(torch_model, base, tmp_path)
    assert scale == 2.0
    torch.sum(torch.sin(published(torch_model))).backward()
    state = {name: p.grad for name, p in torch_model.named_parameters() if "lora_" in name}
    theirs = {name.replace(".default", ""): grad.numpy() for name, grad in state.items() if grad is not None}

    model, given = model_of(DEPTH), single(inputs_of(GRID))

    @jax.jit
    @jax.grad
    def gradient(trained):
        return jnp.sum(jnp.sin(model.apply({"params": lora.assemble(base, trained, scale)}, *given).prediction))

    found = lora_file.to_torch(gradient(trained), PLACES)
    whole = np.sqrt(sum(np.sum(g**2) for g in theirs.values()))
    assert len(theirs) == 2 * (12 * DEPTH - 3)  # nothing reads the text behind the last block
    errors = {
        name: np.linalg.norm(found[f"transformer.{name}"] - g) / max(np.linalg.norm(g), 1e-3 * whole)
        for name, g in theirs.items()
    }
    worst = max(errors, key=errors.get)
    print(f"largest relative error {errors[worst]:.1e} of {worst}")
    # Rounding: diffusers' own float32 is 3e-6 from its float64 in that matrix; tests/models/test_lora.py is in float64.
    assert errors[worst] < 1e-4


def renamed(tensors, form):
    """The same adapters, of scale 0.5, as other programs name them."""
    found = {}
    for key, tensor in tensors.items():
        layer, kind, _ = key.removeprefix("transformer.").rsplit(".", 2)
        if form == "comfy":
            found[f"diffusion_model.{layer}.{kind}.weight"] = tensor * (0.5 if kind == "lora_B" else 1)
        elif form == "default":
            found[f"{layer}.{kind}.default.weight"] = tensor * (0.5 if kind == "lora_B" else 1)
        else:
            layer = f"lora_unet_{layer.replace('.', '_')}" if form == "kohya" else f"transformer.{layer}"
            found[f"{layer}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
            found[f"{layer}.alpha"] = torch.tensor(1.5)
    return found


@pytest.mark.parametrize("form", ["comfy", "default", "kohya", "lightning"])
def test_other_forms_are_read(torch_model, tmp_path, form):
    base = base_of(torch_model)
    trained = random_trained(base, 3)
    file = str(tmp_path / "other.safetensors")
    save_file(renamed(load_file(lora_file.write(str(tmp_path), trained, PLACES, 3.0)), form), file)
    found, scale = lora_file.read(file, PLACES, shapes(base))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(trained), strict=True):
        factor = 0.5 / scale if path[-1].key == "lora_b" else 1
        np.testing.assert_allclose(a, factor * b, rtol=1e-6)


def test_what_does_not_fit_is_told(torch_model, tmp_path):
    base = base_of(torch_model)
    tensors = load_file(lora_file.write(str(tmp_path), random_trained(base, 3), PLACES, 3.0))
    first = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"

    def refused(message, changes):
        file = tmp_path / "changed.safetensors"
        save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, str(file))
        with pytest.raises(UserError, match=message) as error:
            lora_file.read(str(file), PLACES, shapes(base))
        assert "\n" not in str(error.value)

    refused("lacks a matrix", {first: None})
    refused("do not suit a layer of 48 inputs", {first: torch.zeros(3, 47)})
    refused("is of no adapter of this model", {first.replace("blocks.0", "blocks.7"): torch.zeros(3, 48)})
    refused("dora_scale", {first.replace("lora_A.weight", "dora_scale"): torch.zeros(48)})
    refused("holds no adapter", dict.fromkeys(tensors))
    with pytest.raises(UserError, match="no published name"):
        lora_file.to_torch({"patch": {"lora_a": np.zeros((4, 1)), "lora_b": np.zeros((1, 4))}}, PLACES)
    with pytest.raises(UserError, match="no file of routing"):
        lora_file.read_routing(str(tmp_path / lora_file.ADAPTERS))


def test_routing_returns(tmp_path):
    routing = {"stack": {"final_query": {"scale": np.float32([1, 2])}}}
    path = lora_file.write_routing(str(tmp_path), routing, {"kind": "dar"})
    found, settings = lora_file.read_routing(path)
    jax.tree.map(np.testing.assert_array_equal, found, routing)
    assert settings == {"kind": "dar"} and json.dumps(settings)
