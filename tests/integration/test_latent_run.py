"""The whole path of latents, as small as it can be: convert, prepare, train, sample, decoded images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dar_jax import sharding
from dar_jax.data.feed import make_online_encoder
from dar_jax.errors import UserError
from dar_jax.evaluation import scoring
from dar_jax.evaluation.grid import save_grid
from dar_jax.evaluation.sampling import make_sampler, sample_to_file, to_uint8
from dar_jax.evaluation.scoring import evaluate_run
from dar_jax.pretrained import vae as vae_lib
from dar_jax.training.loop import train
from dar_jax.validate import validate
from tests.data.prepared import tiny_vae, write_folder
from tests.evaluation.test_metrics import network
from tests.parity import torch_vae
from tests.training import tiny


def test_from_weights_and_a_folder_to_decoded_samples(tmp_path, monkeypatch):
    mesh = tiny.make_mesh(1, 1)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    state_dict = torch_vae.randomise(torch_vae.AutoencoderKL((32, 32))).state_dict()
    vae_lib.write(str(tmp_path / "vae"), vae_lib.from_torch({k: v.numpy() for k, v in state_dict.items()}))
    write_folder(tmp_path / "images", 24)
    command = [sys.executable, "-m", "dar_jax.prepare", f"--source=folder:{tmp_path / 'images'}", "--image_size=8"]
    command += [f"--vae={tmp_path / 'vae'}", f"--out={tmp_path / 'latents' / 'train'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "24 examples in 1 shards" in done.stdout, done.stderr

    config = latent_config(**{"data.path": str(tmp_path / "latents"), "data.vae": str(tmp_path / "vae")})
    config.data.flip, config.train.num_steps = True, 3
    config.eval.update(every_steps=3, num_samples=0, grid_size=2)
    run = str(tmp_path / "run")
    train(config, run)
    with Image.open(tmp_path / "run" / "samples" / "00000003.png") as inline:
        assert inline.mode == "RGB"
    sample_to_file(config, run, None, ["0", "2"], 4, str(tmp_path / "grid.png"))

    # The same samples as latents, decoded by PyTorch.
    config.data.vae, config.eval.every_steps = "", 0
    sample_to_file(config, run, None, ["0", "2"], 4, str(tmp_path / "latents.npz"))
    with np.load(tmp_path / "latents.npz") as file:
        latents = file["arr_0"]
    assert latents.shape == (8, 4, 4, 4) and latents.dtype == np.float32
    reference = torch_vae.randomise(torch_vae.AutoencoderKL((32, 32)))
    with torch.no_grad():
        decoded = reference.decode(torch.tensor(np.moveaxis(latents, -1, 1) / 0.18215)).movedim(1, -1).numpy()
    save_grid(tmp_path / "expected.png", np.asarray(to_uint8(decoded)), columns=2)
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "expected.png") as expected:
        ours, theirs = (np.asarray(picture, np.int32) for picture in (grid, expected))
    assert np.abs(ours - theirs).max() <= 1 and ours[:, :100].std() > 20

    # Scored are the decoded images, of their size.
    config.data.vae = str(tmp_path / "vae")
    with pytest.raises(UserError, match="latents of 4 channels; to score them give --vae, --inception and --reference"):
        evaluate_run(config, run, None, [1.0], None)
    monkeypatch.setattr(scoring, "load_features", lambda *_: network("inception", channels=3))
    np.savez(tmp_path / "ref.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    config.eval.update(num_samples=24, inception=str(tmp_path / "ref.npz"), reference=str(tmp_path / "ref.npz"))
    (result,) = evaluate_run(config, run, None, [1.0], str(tmp_path / "samples.npz"))
    assert result["scores"]["fid"] > 0 and len(result["settings"]["vae"]) == 64
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (24, 8, 8, 3) and file["arr_0"].std() > 20


def latent_config(**fields):
    config = tiny.make_config()
    config.data.update(source="latents", image_size=4)
    config.model.update(space="latents", input_size=4, channels=4, depth=1)
    config.model.routing.kind = "residual"  # compiles sooner
    config.update_from_flattened_dict(fields)
    return config


def test_images_are_encoded_online(tmp_path, monkeypatch, capsys):
    """A run over images, and the latents of its steps against moments and noise put together by hand."""
    vae_lib.write(str(tmp_path / "vae"), tiny_vae())
    write_folder(tmp_path / "images", 24)
    config = latent_config(**{"data.path": str(tmp_path / "images"), "data.vae": str(tmp_path / "vae")})
    config.data.update(source="folder", image_size=8)
    config.train.num_steps = 2
    mesh = tiny.make_mesh(1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: mesh)
        train(config, str(tmp_path / "run"))
    assert "loss" in capsys.readouterr().out

    encode = make_online_encoder(config, tiny.make_mesh(4, 2))
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)
    latents = [np.asarray(encode(images, step), np.float64) for step in (0, 1, 1)]
    params, model = tiny_vae().params, tiny_vae().model
    mean, std = np.moveaxis(np.asarray(model.apply({"params": params}, images, method="encode"), np.float64), 1, 0)
    noise = [(z / 0.18215 - mean) / std for z in latents]
    assert all(abs(n.mean()) < 5 / np.sqrt(n.size) and abs(n.var() - 1) < 5 * np.sqrt(2 / n.size) for n in noise)
    assert abs((noise[0] * noise[1]).mean()) < 5 / np.sqrt(mean.size)
    np.testing.assert_array_equal(noise[1], noise[2])

    config.data.image_size = 16
    with pytest.raises(UserError, match=r"image_size = 16 makes latents of 8x8x4 .* takes 4x4x4; .* input_size \* 2"):
        make_online_encoder(config, tiny.make_mesh(1, 1))
    config.data.vae = ""
    with pytest.raises(UserError, match=r"space = latents, but .* has images; name in config\.data\.vae"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval.num_samples": 0}, "latents of 4 channels; name their VAE in config.data.vae"),
        ({"data.vae": "vae"}, "num_samples = 10000: to score decoded latents"),
    ],
)
def test_evaluation_of_latents_needs_what_it_has_not(fields, message):
    validate(latent_config(**fields))
    with pytest.raises(UserError, match=message):
        validate(latent_config(**fields, **{"eval.every_steps": 5}))


def test_vae_of_other_latents(tmp_path):
    torch.manual_seed(0)
    state_dict = torch_vae.AutoencoderKL((32,), latents=8).state_dict()
    vae = vae_lib.from_torch({name: tensor.numpy() for name, tensor in state_dict.items()})
    vae_lib.write(str(tmp_path), vae)
    config = latent_config(**{"data.vae": str(tmp_path)})
    with pytest.raises(UserError, match=r"decodes 8 channels, but config\.model\.channels = 4"):
        make_sampler(config, None, tiny.make_mesh(1, 1))
