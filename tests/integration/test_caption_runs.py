"""Runs of a tiny MM-DiT on captioned images: words in buckets with a resume, and prepared embeddings with samples."""

import jax
import numpy as np
import pytest

from dar_jax import sharding
from dar_jax.checkpoint import load_config, restore_ema, saved_steps
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.init_from import check_init_from
from dar_jax.logs import read_metrics
from dar_jax.training.loop import train
from dar_jax.training.setup import build_algorithm, set_up
from dar_jax.validate import validate
from tests.data.test_caption_folder import write_captions
from tests.data.test_texts import CAPTIONS, FakeEncoder, prepare_captions
from tests.training import tiny

SIZES = [(8, 8), (8, 8), (8, 9), (9, 8), (8, 16), (20, 35)]


def make_config(source, root):
    config = tiny.make_config()
    config.data.update(source=source, path=str(root), image_size=8)
    config.model.update(family="mmdit", channels=3, depth=1, text_size=16, text_depth=0, text_length=6)
    config.model.routing.kind = "residual"  # compiles sooner
    config.train.update(num_steps=4, batch_size=2)
    config.checkpoint.every_steps = 2
    return config


@pytest.fixture(scope="module", autouse=True)
def one_device(tmp_path_factory):
    with tiny.all_runs_on((1, 1), tmp_path_factory.mktemp("cache")):
        yield


def weights(workdir):
    config = load_config(workdir)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        ema, step = restore_ema(workdir, set_up(config, build_algorithm(config), mesh).state.ema)
    return jax.device_get(jax.tree.leaves(ema)), step


def losses(workdir):
    return [(line["step"], line["loss"]) for line in read_metrics(workdir) if "loss" in line]


def test_words_in_buckets_resume_bit_for_bit(tmp_path, capsys):
    write_captions(tmp_path / "images", CAPTIONS, SIZES)
    config = make_config("captions", tmp_path / "images")
    config.data.buckets = ("8x8", "8x16")
    validate(config)
    train(config, str(tmp_path / "whole"))
    out = capsys.readouterr().out
    assert "compiling the train step for 8x8x3, shape" in out and "compiling the train step for 8x16x3, shape" in out
    assert "shape 2 of at most 2" in out and "shape 3" not in out

    config.train.num_steps = 2
    train(config, str(tmp_path / "parts"))
    config.train.num_steps = 4
    train(config, str(tmp_path / "parts"))
    assert saved_steps(str(tmp_path / "parts"))[-1] == 4
    assert losses(str(tmp_path / "parts")) == losses(str(tmp_path / "whole"))
    (whole, _), (parts, step) = (weights(str(tmp_path / name)) for name in ("whole", "parts"))
    assert step == 4
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    config.data.buckets = ("8x8",)
    with pytest.raises(UserError, match=r"holds a run with config\.data\.buckets = .*8x16"):
        train(config, str(tmp_path / "parts"))


def test_embeddings_from_a_folder_to_samples(tmp_path, capsys):
    write_captions(tmp_path / "images", CAPTIONS, SIZES)
    for split, buckets in (("train", ("8x8", "8x16")), ("test", ())):
        prepare_captions(tmp_path / "images", tmp_path / "data" / split, FakeEncoder(), buckets=buckets)
    config = make_config("latents", tmp_path / "data")
    config.data.buckets = ("8x8", "8x16")
    config.model.update(text="embeddings", text_size=4, text_length=24)
    config.optimizer.update(learning_rate=0.05, ema_decay=0.0)  # so that the texts tell after few steps
    config.sampler.cfg_scale = 2.0
    config.eval.update(every_steps=4, num_samples=0, final_samples=0, grid_size=2, loss_images=4)
    validate(config)
    workdir = str(tmp_path / "run")
    train(config, workdir)
    out = capsys.readouterr().out
    assert "tokens, shape 1 of at most 8" in out and "val_loss" in out
    assert (tmp_path / "run" / "samples" / "00000004.png").exists()
    stored = load_config(workdir)
    assert stored.model.text_encoder == "f" * 64

    # Weights do not hang on the length of texts or the size of images, but on what encoded the texts.
    following = load_config(workdir)
    following.init_from = workdir
    following.model.update(text_length=48, input_size=16)
    check_init_from(following)
    following.model.text_encoder = "0" * 64
    with pytest.raises(UserError, match=r"is of config\.model\.text_encoder = \W?ffff"):
        check_init_from(following)

    def draw(prompts, name):
        sample_to_file(stored, workdir, None, prompts, 1, str(tmp_path / name))
        with np.load(tmp_path / name) as file:
            return file["arr_0"].astype(int), file["arr_1"].tolist()

    images, captions = draw(["größe", "x"], "two.npz")
    assert captions == ["größe", "x"] and images.shape == (2, 8, 8, 3)
    other, _ = draw(["x", "größe"], "swapped.npz")  # the same noises, the texts the other way round
    assert (images != other).any()

    encoder = FakeEncoder()
    encoder.fingerprint = "0" * 64
    for split, buckets in (("train", ("8x8", "8x16")), ("test", ())):
        prepare_captions(tmp_path / "images", tmp_path / "other" / split, encoder, buckets=buckets)
    config.data.path, config.train.num_steps = str(tmp_path / "other"), 6
    config.data.eval_split = "train"
    with pytest.raises(UserError, match=r"loss_images = 4 needs squares, but config\.data\.eval_split is prepared in"):
        train(config, workdir)
    config.data.eval_split = "test"
    with pytest.raises(UserError, match=r"holds a run with config\.model\.text_encoder = \W?ffff"):
        train(config, workdir)
