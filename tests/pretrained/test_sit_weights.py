"""Official SiT weights: our model computes what an independent PyTorch SiT computes, and the converter is exact."""

import argparse
import itertools
import subprocess
import sys
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.checkpoint import claim_workdir, load_config
from dar_jax.errors import UserError
from dar_jax.models.layers import position_table
from dar_jax.pretrained import sit
from dar_jax.pretrained.state_dict import read_state_dict
from tests.parity import torch_sit

TINY = {
    "input_size": 6, "channels": 3, "num_classes": 5, "patch_size": 2, "hidden_size": 8, "depth": 2, "num_heads": 2,
    "learn_sigma": True,
}  # fmt: skip
LATENTS = {"input_size": 32, "channels": 4, "num_classes": 1000, "patch_size": 2, "learn_sigma": True}
XL_SHAPED = {**LATENTS, "input_size": 16, "hidden_size": 144, "depth": 2, "num_heads": 2}  # head_dim 72
SMALL = {**LATENTS, **config_lib.SIZES["S"]}


def torch_model(fields):
    return torch_sit.randomise(torch_sit.SiT(**fields))


def jax_model(fields):
    config = config_lib.route(config_lib.default(), "residual").model
    config.update(fields)
    return models.build(config)


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(XL_SHAPED, id="XL-shaped"),
        pytest.param({**TINY, "learn_sigma": False, "patch_size": 3}, id="plain"),
        pytest.param({**SMALL, "input_size": 16, "depth": 2}, id="S/2-wide"),
        pytest.param(SMALL, id="S/2", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_equal_pytorch(fields):
    reference = torch_model(fields)
    state_dict = reference.state_dict()
    params, model = sit.params_from_torch(state_dict), jax_model(sit.infer_model(state_dict, fields["num_heads"]))

    rng = np.random.default_rng(0)
    x, probe = rng.normal(size=(2, 2, fields["channels"], *[fields["input_size"]] * 2)).astype(np.float32)
    t, y = np.float32([0.3, 0.9]), np.array([1, fields["num_classes"]])  # a class and the null label
    out = reference(torch.tensor(x), torch.tensor(t), torch.tensor(y))
    (out * torch.tensor(probe)).sum().backward()

    def loss(params):
        out = model.apply({"params": params}, jnp.moveaxis(x, 1, -1), t, {"label": y}).prediction
        return jnp.sum(out * jnp.moveaxis(probe, 1, -1)), out

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    errors = {"output": relative(np.moveaxis(ours, -1, 1), out.detach().numpy())}
    ours = sit.params_to_torch(gradients, patch_size=fields["patch_size"], input_size=fields["input_size"])
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            errors[name] = relative(ours[name], parameter.grad.numpy())
    print(
        "largest relative errors:",
        sorted(((e, name) for name, e in errors.items()), reverse=True)[:3],
        errors["output"],
    )
    assert len(errors) == len(state_dict)  # pos_embed has no gradient, the output is one more
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_round_trip_is_bit_exact(learn_sigma):
    state_dict = torch_model({**TINY, "learn_sigma": learn_sigma}).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state_dict.items()}
    params = sit.params_from_torch(state_dict)
    jax.tree.map(np.testing.assert_array_equal, sit.params_from_torch(arrays), params)  # numpy goes in as well
    back = sit.params_to_torch(params, patch_size=2, input_size=6)
    assert back.keys() == arrays.keys()
    for name in back:
        if name == "pos_embed":  # ours, not theirs
            np.testing.assert_allclose(back[name], arrays[name], atol=1e-6)
        else:
            assert back[name].dtype == np.float32 and back[name].flags.c_contiguous
            np.testing.assert_array_equal(back[name], arrays[name])


def test_tree_is_that_of_the_model():
    fields = {**TINY, "channels": 1}
    model = jax_model(fields)
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})
    )
    expected = jax.tree.map(lambda p: p.shape, nn.meta.unbox(abstract)["params"])
    assert jax.tree.map(lambda p: p.shape, sit.params_from_torch(torch_model(fields).state_dict())) == expected


def test_fields_are_inferred():
    state_dict = torch_model(TINY).state_dict()
    assert sit.infer_model(state_dict, 2) == {**TINY, "mlp_ratio": 4.0}
    with pytest.raises(UserError, match="--num_heads is required"):
        sit.infer_model(state_dict)
    with pytest.raises(UserError, match="--num_heads = 3 must divide"):
        sit.infer_model(state_dict, 3)
    with torch.device("meta"):  # shapes of the published sizes
        for size, fields in config_lib.SIZES.items():
            meta = torch_sit.SiT(**{**LATENTS, **fields}).state_dict()
            meta = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in meta.items()}
            meta["pos_embed"] = position_table(16, fields["hidden_size"])[None]
            assert sit.infer_model(meta)["num_heads"] == fields["num_heads"], size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("blocks.1.attn.proj.bias"), 'lack the key "blocks.1.attn.proj.bias"'),
        (lambda d: d.pop("x_embedder.proj.weight"), 'lack the key "x_embedder.proj.weight"'),
        (lambda d: d.pop("pos_embed"), 'lack the key "pos_embed"'),
        (lambda d: d.update({"blocks.0.attn.q_norm.weight": np.ones(4)}), 'have the key "blocks.0.attn.q_norm.weight"'),
        (lambda d: d.update({"blocks.1.mlp.fc2.weight": np.ones((8, 31))}), r'mlp.fc2.weight" has shape \(8, 31\)'),
        (lambda d: d.update({"final_layer.linear.weight": np.ones((9, 8))}), r'linear.weight" has shape \(9, 8\)'),
        (lambda d: d.update({"t_embedder.mlp.0.bias": np.ones((8, 1))}), '"t_embedder.mlp.0.bias" .* not of rank 1'),
        (lambda d: d.update(pos_embed=d["pos_embed"].flip(-1)), '"pos_embed" is not the fixed sin-cos table of 3 x 3'),
    ],
)  # fmt: skip
def test_wrong_weights_are_named(change, message):
    state_dict = torch_model(TINY).state_dict()
    change(state_dict)
    with pytest.raises(UserError, match=message):
        sit.params_from_torch(state_dict)


def test_files_are_read(tmp_path, monkeypatch):
    state_dict = torch_model(TINY).state_dict()
    other = {name: tensor + 1 for name, tensor in state_dict.items()}
    flags = argparse.Namespace(model="SiT-S/2")
    torch.save(state_dict, tmp_path / "bare.pt")
    torch.save({"model": other, "ema": state_dict, "opt": {}, "args": flags}, tmp_path / "training.pt")
    torch.save({"model": state_dict}, tmp_path / "model.pt")
    np.savez(tmp_path / "arrays.npz", **{name: tensor.numpy() for name, tensor in state_dict.items()})
    for name in ("bare.pt", "training.pt", "model.pt", "arrays.npz"):
        read = read_state_dict(str(tmp_path / name))
        assert read.keys() == state_dict.keys()
        for key in read:
            np.testing.assert_array_equal(read[key], state_dict[key])

    (tmp_path / "broken.pt").write_bytes(b"not torch")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"a": {"b": torch.ones(2)}}}, tmp_path / "nested.pt")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "complex.pt")
    np.savez(tmp_path / "words.npz", a=np.array("x"))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("a", "no array")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "weights.bin").touch()
    (tmp_path / "broken.npz").write_bytes((tmp_path / "arrays.npz").read_bytes()[:-100])
    for name, message in {
        "broken.npz": "cannot be read as .npz", "none.pt": "is no file", "broken.pt": "cannot be read",
        "list.pt": "holds a list", "weights.bin": "must end in", "broken.safetensors": "cannot be read as .safetensors",
        **dict.fromkeys(("nested.pt", "complex.pt", "words.npz", "text.npz"), ".a., which is no array of real numbers"),
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_state_dict(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        read_state_dict(str(tmp_path / "bare.pt"))


def run(*words):
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)


def test_doors_convert_and_sample(tmp_path):
    """The converted workdir gives the samples that PyTorch gives: three Euler steps from the same noise."""
    fields = {**TINY, "channels": 1, "num_classes": 10}
    reference = torch_model(fields)
    torch.save(reference.state_dict(), tmp_path / "x.pt")
    out = str(tmp_path / "workdir")
    convert = ["dar_jax.convert", "--kind=sit", f"--input={tmp_path / 'x.pt'}", f"--output={out}"]
    missing = run(*convert)
    assert missing.returncode == 2 and "--num_heads" in missing.stderr
    done = run(*convert, "--num_heads=2")
    assert done.returncode == 0, done.stderr
    assert load_config(out).model.learn_sigma and load_config(out).model.input_size == 6
    again = run(*convert, "--num_heads=2")
    assert again.returncode == 2 and "holds checkpoints; take another" in again.stderr
    with pytest.raises(UserError, match=r"--config\.init_from"):  # main says what the workdir is for
        claim_workdir(out, load_config(out))

    samples = str(tmp_path / "s.npz")
    done = run("dar_jax.sample", f"--workdir={out}", f"--out={samples}", "--labels=3,7", "--num_per_label=4",
               "--steps=3", "--sampler=euler", "--batch_size=8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(samples) as file:
        latents, labels = file["arr_0"], torch.tensor(file["arr_1"])
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(load_config(out).seed), i))[0] for i in range(8)]
    x = np.stack([jax.random.normal(key, (6, 6, 1)) for key in keys])
    x, times = torch.tensor(np.moveaxis(x, -1, 1)), torch.linspace(0, 1, 4)
    with torch.no_grad():
        for t, following in itertools.pairwise(times):
            x = x + (following - t) * reference(x, t.expand(8), labels)
    expected = x.movedim(1, -1).numpy()  # latents: official weights are of no other kind
    assert np.abs(latents - expected).max() < 1e-4 * expected.std()
