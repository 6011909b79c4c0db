"""The autoencoder of Qwen-Image computes what diffusers computes for single images, and serves as the other does."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dar_jax import files
from dar_jax.data.feed import make_online_encoder
from dar_jax.data.images import to_float
from dar_jax.data.latents import draw_latent
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.pretrained import qwen_vae
from dar_jax.pretrained import vae as vae_lib
from tests.data.prepared import prepare_folder, write_folder
from tests.pretrained.test_vae import apply, arrays, convert, images, nchw, nhwc, relative
from tests.training import tiny

BASE = 16


def published(base=BASE):
    """diffusers' own model with random weights of which no slice in time is like another."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model, generator = diffusers.AutoencoderKLQwenImage(base_dim=base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                slices = parameter.shape[2] if parameter.ndim == 5 else 1
                parameter.copy_(noise * (slices / parameter[0].numel()) ** 0.5)
        model.decoder.conv_out.weight *= 0.4  # few pixels are cut
    return model.eval()


@pytest.fixture(scope="module")
def small():
    model = published()
    return model, vae_lib.from_torch(arrays(model.state_dict()))


def frame(x):
    """[B, H, W, C] -> [B, C, 1, H, W]."""
    return nchw(np.asarray(x))[:, :, None]


@pytest.mark.parametrize(("base", "height", "width"), [(BASE, 52, 40), (96, 32, 48)], ids=["small", "full"])
def test_moments_latents_and_images_equal_those_of_diffusers(base, height, width, small):
    """Also normalised, with the constants of the published config."""
    model = small[0] if base == BASE else published(base)
    vae = vae_lib.from_torch(arrays(model.state_dict()))
    x = to_float(images(2 if base == BASE else 1, height, width))
    mean, std = np.array(model.config["latents_mean"]), np.array(model.config["latents_std"])
    z = np.random.default_rng(1).normal(size=(len(x), height // 8, width // 8, 16)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(frame(x)).latent_dist
        decoded = nhwc(model.decode(frame(z * std + mean).float()).sample[:, :, 0])
    expected_mean, expected_std = (nhwc(part[:, :, 0]) for part in (posterior.mean, posterior.std))

    mesh = tiny.make_mesh(1, 1)
    moments, found = np.asarray(vae_lib.make_encoder(vae, mesh)(x)), np.asarray(vae_lib.make_decoder(vae, mesh)(z))
    assert found.shape == (len(x), height // 8 * 8, width // 8 * 8, 3)
    assert np.mean(np.abs(decoded) < 1) > 0.9 and decoded.std() > 0.1
    errors = {
        "mean": relative(moments[:, 0], expected_mean),
        "std": relative(moments[:, 1], expected_std),
        "latents": relative(np.asarray(vae.normalise(moments[:, 0])), (expected_mean - mean) / std),
        "image": relative(found, decoded),
    }
    print("relative errors:", errors)
    assert max(errors.values()) < 1e-5


def test_full_model_has_the_published_number_of_weights():
    """127 million, without the 2 of 3 slices in time and the layers that an image has no use for."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        tensors = diffusers.AutoencoderKLQwenImage().state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if "time_conv" not in name}
    count = sum(tensor.numel() // (tensor.shape[2] if tensor.ndim == 5 else 1) for tensor in kept.values())
    leaves = jax.tree.leaves(qwen_vae._abstract(qwen_vae.AutoencoderKLQwenImage()))
    assert count == sum(leaf.size for leaf in leaves)
    assert 126e6 < sum(tensor.numel() for tensor in tensors.values()) < 128e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("decoder.mid_block.resnets.1.norm2.gamma"), 'lack the key "decoder.mid_block.resnets.1.norm2'),
        (lambda d: d.pop("encoder.down_blocks.0.conv1.weight"), 'lack the key "encoder.down_blocks.0'),
        (lambda d: d.update({"loss.logvar": np.zeros(1)}), 'have the key "loss.logvar"'),
        (lambda d: d.update({"quant_conv.weight": np.zeros((8, 8, 1, 1, 1))}), r'"quant_conv.weight" has shape \(8, 8'),
        (lambda d: d.update({"decoder.norm_out.gamma": np.zeros((4, 4))}), r'"decoder.norm_out.gamma" has shape \(4'),
        (lambda d: d.update({"post_quant_conv.bias": np.zeros(4)}), r"of 16 channels.* have shape \(4,\)"),
    ],
)
def test_wrong_weights_are_named(change, message, small):
    state_dict = arrays(small[0].state_dict())
    change(state_dict)
    with pytest.raises(UserError, match=message):
        vae_lib.from_torch(state_dict)


def test_door_recognises_it_and_its_latents_are_prepared_and_encoded_online(small, tmp_path):
    model, expected = small
    weights, out = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "vae"
    save_file(model.state_dict(), weights)
    done = convert(weights, out)
    assert done.returncode == 0, done.stderr
    assert f"AutoencoderKLQwenImage, f8, fingerprint {expected.fingerprint}" in done.stdout
    vae = vae_lib.load(str(out), "--vae")
    assert vae._replace(params=None) == expected._replace(params=None)
    jax.tree.map(np.testing.assert_array_equal, vae.params, expected.params)
    assert vae_lib.read_factor(str(out), "--vae") == 8
    header = files.unseal(json.loads((out / "vae.json").read_text()))
    files.write_json(out / "vae.json", files.seal({**header, "kind": "AutoencoderKLNext"}))
    with pytest.raises(UserError, match=r"of the kind 'AutoencoderKLNext', which this version does not know"):
        vae_lib.load(str(out), "--vae")
    files.write_json(out / "vae.json", files.seal(header))

    write_folder(tmp_path / "images", 3, side=16)
    prepare_folder(tmp_path / "images", tmp_path / "latents" / "train", vae, size=16, dtype="float32")
    config = tiny.make_config()
    config.data.update(source="latents", path=str(tmp_path / "latents"), image_size=2, vae=str(out))
    source = open_source(config.data, "train")
    moments = source[1]["moments"][0]
    drawn = draw_latent(moments, source.shift, source.scale, np.random.default_rng(5))
    assert drawn.dtype == np.float32
    z = moments[0] + moments[1] * np.random.default_rng(5).standard_normal((2, 2, 16), np.float32)
    mean, std = np.array(model.config["latents_mean"]), np.array(model.config["latents_std"])
    np.testing.assert_allclose(drawn, (z - mean) / std, rtol=1e-5, atol=1e-5)

    config.data.update(source="folder", path=str(tmp_path / "images"), image_size=16)
    config.model.update(space="latents", input_size=2, channels=16)
    x = to_float(images(8, 16, 16))
    draws = make_online_encoder(config, tiny.make_mesh(1, 1))(x, 3)
    moments = apply(vae, x, "encode")
    noise = (draws * std + mean - moments[:, 0]) / moments[:, 1]
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
