"""The VAE computes what PyTorch computes, keeps its weights, and knows them again."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dar_jax import files, sharding
from dar_jax.config import default
from dar_jax.data.images import to_float
from dar_jax.errors import UserError
from dar_jax.pretrained import vae as vae_lib
from tests.parity import torch_vae

TINY = (32, 32, 64, 64)
FULL = (128, 256, 512, 512)


def arrays(state_dict):
    return {name: tensor.numpy() for name, tensor in state_dict.items()}


def images(count, height, width):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def nchw(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def apply(vae, x, method):
    return np.asarray(jax.jit(lambda params, x: vae.model.apply({"params": params}, x, method=method))(vae.params, x))


@pytest.mark.parametrize(
    ("widths", "height", "width"),
    [
        pytest.param(TINY, 28, 40, id="tiny"),  # 28 is Fashion-MNIST's size, which 8 does not divide
        pytest.param(FULL, 32, 32, id="full-32"),
        pytest.param(FULL, 256, 256, id="full-256", marks=pytest.mark.slow),
    ],
)
def test_moments_and_images_equal_pytorch(widths, height, width):
    reference = torch_vae.randomise(torch_vae.AutoencoderKL(widths))
    vae = vae_lib.from_torch(arrays(reference.state_dict()))
    x = to_float(images(1 if widths == FULL else 2, height, width))
    mean, std = (nhwc(part) for part in reference.encode(nchw(x)))
    moments = apply(vae, x, "encode")
    assert moments.shape == (len(x), 2, height // 8, width // 8, 4)
    z = np.random.default_rng(1).normal(size=mean.shape).astype(np.float32)
    decoded, expected = apply(vae, z, "decode"), nhwc(reference.decode(nchw(z)))
    assert decoded.shape == (len(x), height // 8 * 8, width // 8 * 8, 3)
    errors = relative(moments[:, 0], mean), relative(moments[:, 1], std), relative(decoded, expected)
    print("relative errors of mean, std, image:", errors)
    assert max(errors) < 1e-4
    assert mean.std() > 0.1 and expected.std() > 0.1


@pytest.mark.parametrize(
    "widths", [pytest.param(TINY, id="tiny"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
)
def test_moments_and_images_equal_those_of_diffusers(widths):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    levels = len(widths)
    published = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )
    torch_vae.randomise(published)
    vae = vae_lib.from_torch(arrays(published.state_dict()))
    x = to_float(images(1, 32, 32))
    with torch.no_grad():
        posterior = published.encode(nchw(x)).latent_dist
        decoded = published.decode(posterior.mean).sample
    moments = apply(vae, x, "encode")
    errors = relative(moments[:, 0], nhwc(posterior.mean)), relative(moments[:, 1], nhwc(posterior.std))
    errors += (relative(apply(vae, moments[:, 0], "decode"), nhwc(decoded)),)
    print("relative errors of mean, std, image:", errors)
    assert max(errors) < 1e-4


def test_variance_is_clipped_as_published():
    reference = torch_vae.randomise(torch_vae.AutoencoderKL((32,)))
    with torch.no_grad():
        reference.quant_conv.bias[4:] = torch.tensor([-100.0, 0.0, 0.0, 100.0])
    vae = vae_lib.from_torch(arrays(reference.state_dict()))
    std = apply(vae, to_float(images(1, 8, 8)), "encode")[0, 1]
    np.testing.assert_allclose(std[..., 0], np.exp(-15), rtol=1e-5)
    np.testing.assert_allclose(std[..., 3], np.exp(10), rtol=1e-5)


def test_full_model_has_the_published_number_of_weights():
    with torch.device("meta"):
        count = sum(tensor.numel() for tensor in torch_vae.AutoencoderKL(FULL).state_dict().values())
    leaves = jax.tree.leaves(vae_lib._abstract(vae_lib.AutoencoderKL()))
    assert count == sum(leaf.size for leaf in leaves) == 83_653_863


def test_old_and_new_attention_names_are_the_same_weights():
    state_dict = torch_vae.randomise(torch_vae.AutoencoderKL((32, 32))).state_dict()
    old = torch_vae.old_names(state_dict)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    assert "decoder.mid_block.attentions.0.query.weight" in old
    first, second = vae_lib.from_torch(arrays(state_dict)), vae_lib.from_torch(arrays(old))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.fingerprint == second.fingerprint
    state_dict["decoder.conv_out.bias"] += 1e-3
    assert vae_lib.from_torch(arrays(state_dict)).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("decoder.mid_block.resnets.1.norm2.bias"), 'lack the key "decoder.mid_block.resnets.1.norm2'),
        (lambda d: d.pop("encoder.down_blocks.0.resnets.0.conv1.weight"), 'lack the key "encoder.down_blocks.0'),
        (lambda d: d.pop("post_quant_conv.bias"), 'lack the key "post_quant_conv.bias"'),
        (lambda d: d.update({"loss.logvar": np.zeros(1)}), 'have the key "loss.logvar"'),
        (lambda d: d.update({"quant_conv.weight": np.zeros((4, 8, 1, 1))}), r'"quant_conv.weight" has shape \(4, 8, 1'),
        (lambda d: d.update({"encoder.down_blocks.1.resnets.0.conv1.weight": np.zeros((48, 32, 3, 3))}), "48 channels"),
    ],
)
def test_wrong_weights_are_named(change, message):
    state_dict = arrays(torch_vae.AutoencoderKL((32, 32)).state_dict())
    change(state_dict)
    with pytest.raises(UserError, match=message):
        vae_lib.from_torch(state_dict)


def convert(weights, out):
    command = [sys.executable, "-m", "dar_jax.convert", "--kind=vae", f"--input={weights}", f"--output={out}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_door_writes_a_directory_that_is_read_back(tmp_path):
    state_dict = torch_vae.old_names(torch_vae.randomise(torch_vae.AutoencoderKL((32, 64))).state_dict())
    weights, out = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "vae"
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, weights)
    done = convert(weights, out)
    assert done.returncode == 0, done.stderr
    expected, vae = vae_lib.from_torch(arrays(state_dict)), vae_lib.load(str(out), "--vae")
    assert vae.model == expected.model and vae.fingerprint == expected.fingerprint in done.stdout
    assert vae.scale == 0.18215 and vae.model.factor == 2
    jax.tree.map(np.testing.assert_array_equal, vae.params, expected.params)

    again = convert(weights, out)
    assert again.returncode == 2 and "holds a VAE; take another" in again.stderr
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    broken = convert(weights, tmp_path / "other")
    assert broken.returncode == 2 and "cannot be read" in broken.stderr and broken.stderr.count("\n") == 1

    header = files.unseal(json.loads((out / "vae.json").read_text()))
    files.write_json(out / "vae.json", files.seal({**header, "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match=r"--vae = .* not those of vae\.json"):
        vae_lib.load(str(out), "--vae")
    with pytest.raises(UserError, match=r"vae\.json. cannot be read .*config\.data\.vae must be .*--kind=vae"):
        vae_lib.load(str(tmp_path), "config.data.vae")


def test_devices_and_chunks_change_nothing(monkeypatch):
    """Eight devices that take three of their five images at a time, against one call and the scale by hand."""
    monkeypatch.setattr(vae_lib, "CHUNK", 3)
    vae = vae_lib.from_torch(arrays(torch_vae.randomise(torch_vae.AutoencoderKL((32, 32))).state_dict()))
    mesh = sharding.make_mesh(default().mesh)
    assert mesh.size == 8
    x = images(40, 8, 8)
    moments = vae_lib.make_encoder(vae, mesh)(x)
    assert len(moments.sharding.device_set) == 8
    expected = apply(vae, to_float(x), "encode")
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    z = 0.18215 * expected[:, 0]
    decoded = vae_lib.make_decoder(vae, mesh)(z)
    np.testing.assert_allclose(decoded, apply(vae, expected[:, 0], "decode"), rtol=1e-3, atol=1e-4)
