"""REPA on latents from end to end: prepared with their images, aligned with an encoder, resumed, sampled, planned."""

import json

import jax
import numpy as np
import pytest

from dar_jax import planning, sharding
from dar_jax.checkpoint import load_config
from dar_jax.data.feed import open_batches
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.pretrained import dino, dino_weights
from dar_jax.pretrained import vae as vae_lib
from dar_jax.training import loop
from tests.data.prepared import prepare_folder, tiny_vae, write_folder
from tests.integration.test_latent_run import latent_config
from tests.training import tiny

SMALL = {
    "version": 2, "hidden_size": 64, "depth": 1, "num_heads": 1, "num_registers": 0, "patch_size": 2, "table_size": 3,
}  # fmt: skip


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setitem(dino.SIZES, "dinov2_s", SMALL)
    write_folder(tmp_path / "images", 12)
    vae_lib.write(str(tmp_path / "vae"), tiny_vae())
    prepare_folder(tmp_path / "images", tmp_path / "latents" / "train", tiny_vae(), keep=True)
    network = dino.Dino(**SMALL)
    params = jax.device_get(sharding.unbox(dino.initial(network)))
    encoder = dino_weights.Encoder(network, params, dino_weights.fingerprint(params))
    dino_weights.write(str(tmp_path / "dino"), encoder)
    return tmp_path


def make_config(places, **fields):
    settings = {"data.path": str(places / "latents"), "data.vae": str(places / "vae"), "data.flip": True}
    settings |= {"model.depth": 2, "model.patch_size": 1, "repa.target": "encoder", "repa.block": 1}
    settings |= {"repa.encoder": "dinov2_s", "repa.weights": str(places / "dino"), "repa.projector": "conv"}
    return latent_config(**{**settings, **fields})


@pytest.mark.parametrize("source", ["latents", "folder"])
def test_image_and_latents_are_flipped_together(places, source):
    """Prepared or encoded online, the image of a batch encodes to its latents."""
    online = {"data.source": "folder", "data.path": str(places / "images"), "data.image_size": 8}
    config = make_config(places, **(online if source == "folder" else {}))
    mesh = tiny.make_mesh(1, 1)
    with sharding.use(mesh), open_batches(config, mesh, batch_size=12) as batches:
        batch = jax.device_get(next(batches))
    assert batch["image"].shape == (12, 8, 8, 3) and batch["image"].dtype == np.uint8
    moments = vae_lib.make_encoder(tiny_vae(), mesh)(batch["image"])
    latents = tiny_vae().scale * np.asarray(moments[:, 0])
    mirrors = tiny_vae().scale * np.asarray(vae_lib.make_encoder(tiny_vae(), mesh)(batch["image"][:, :, ::-1])[:, 0])
    distance = [np.abs(batch["x1"] - x).mean(axis=(1, 2, 3)) for x in (latents, mirrors)]
    assert (distance[0] < 0.5 * distance[1]).all()


def test_a_run_is_resumed_exactly_and_sampled(places, capsys):
    def losses(workdir):
        lines = [json.loads(line) for line in (places / workdir / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["loss_repa"], line["grad_norm_repa"]) for line in lines if "loss" in line]

    config = make_config(places)
    with tiny.all_runs_on((2, 2), places / "cache"):
        config.train.num_steps = 4
        loop.train(config, str(places / "whole"))
        assert "loss_repa" in capsys.readouterr().out
        config.train.num_steps = 2
        loop.train(config, str(places / "parts"))
        config.train.num_steps = 4
        loop.train(config, str(places / "parts"))
        assert losses("parts") == losses("whole") and len(losses("whole")) == 4
        assert len(set(losses("whole"))) == 4
        sample_to_file(config, str(places / "whole"), None, ["0", "2"], 2, str(places / "grid.png"))
        started = make_config(places, init_from=str(places / "whole"))
        started.train.num_steps = 1
        loop.train(started, str(places / "started"))
        plain = make_config(places, init_from=str(places / "whole"), **{"repa.target": "none"})
        plain.train.num_steps = 1
        loop.train(plain, str(places / "plain"))
        adapted = make_config(places, init_from=str(places / "whole"), **{"lora.rank": 2})
        adapted.train.num_steps = 2
        loop.train(adapted, str(places / "adapted"))  # the encoder and the base are frozen side by side
        assert len(losses("adapted")) == 2 and losses("adapted")[0][2] > 0
        sample_to_file(
            load_config(str(places / "adapted")), str(places / "adapted"), None, ["0"], 1, str(places / "a.png")
        )
        with pytest.raises(UserError, match=r"holds a run with config\.repa\.projector = conv, not mlp"):
            loop.train(make_config(places, **{"repa.projector": "mlp"}), str(places / "whole"))


def test_data_without_images_are_told(places):
    prepare_folder(places / "images", places / "bare" / "train", tiny_vae(), keep=False)
    with pytest.raises(
        UserError, match=r"config\.repa\.target needs images, but the records of .* --keep_images"
    ) as error:
        loop.train(make_config(places, **{"data.path": str(places / "bare")}), str(places / "run"))
    assert "\n" not in str(error.value) and not (places / "run" / "checkpoints").exists()


def test_damaged_weights_of_the_encoder_are_told(places):
    (places / "dino" / "encoder.json").write_text((places / "dino" / "encoder.json").read_text().replace("64", "65", 1))
    with pytest.raises(UserError, match=r"encoder\.json. cannot be read"):
        loop.train(make_config(places), str(places / "run"))


def test_the_planner_counts_the_encoder(places):
    config = make_config(places)
    found, plain = (
        planning.make_plan(config, "cpu:8"),
        planning.make_plan(make_config(places, **{"repa.target": "none"}), "cpu:8"),
    )
    assert "frozen" in found.memory_bytes and "frozen" not in plain.memory_bytes
    assert found.memory_bytes["params"] > plain.memory_bytes["params"]
    assert found.memory_bytes["ema"] == plain.memory_bytes["ema"]
    assert found.flops_per_step > plain.flops_per_step
