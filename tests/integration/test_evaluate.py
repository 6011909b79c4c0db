"""The door `evaluate`: scores of a run and of a file agree, a stopped evaluation goes on, mistakes are one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dar_jax import sharding
from dar_jax.checkpoint import write_weights
from dar_jax.data.pipeline import load_images
from dar_jax.errors import UserError
from dar_jax.evaluation import scoring
from dar_jax.evaluation.features import convnet_features
from dar_jax.evaluation.likelihood import likelihood_of_run
from dar_jax.evaluation.scoring import (
    detail_of_file,
    detail_of_run,
    evaluate_file,
    evaluate_run,
    table,
    write_reference,
)
from dar_jax.evaluation.statistics import Statistics, frechet_distance
from dar_jax.pretrained import inception
from tests.evaluation.test_metrics import network
from tests.parity.torch_inception import random_inception
from tests.training import tiny


@pytest.fixture(autouse=True, scope="module")
def two_devices(tmp_path_factory):
    with tiny.all_runs_on((2, 1), tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Converted Inception weights: random ones, so that nothing here is a real FID."""
    path = str(tmp_path_factory.mktemp("weights") / "inception.npz")
    inception.write_params(path, inception.params_from_torch(random_inception().state_dict()))
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of random weights, whose samples depend on noise, label and guidance."""
    path, config = tmp_path_factory.mktemp("run"), tiny.make_config()
    params = jax.jit(lambda: sharding.unbox(tiny.initial(config)))()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) * 0.3, params)
    write_weights(str(path), config, params)
    return str(path)


def make_config(**fields):
    config = tiny.make_config()
    config.eval.update(num_samples=24, **fields)
    return config


def scores(results):
    return [result["scores"] for result in results]


@pytest.fixture
def drawn(monkeypatch):
    """Indices of the samples that were drawn."""
    indices, sample_images = [], scoring.sample_images

    def spy(draw, params, condition, batch_size, mesh, *, first=0):
        for batch in sample_images(draw, params, condition, batch_size, mesh, first=first):
            indices.extend(range(first, first + len(batch)))
            first += len(batch)
            yield batch

    monkeypatch.setattr(scoring, "sample_images", spy)
    monkeypatch.setattr(scoring, "SHARD", 8)
    return indices


def test_a_reference_is_that_of_all_images(weights, tmp_path, monkeypatch):
    """Of a folder, through the whole Inception network; arr_0 holds an evenly spaced part when there are many."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
    for i, picture in enumerate(pictures):
        folder = tmp_path / "held_out" / str(i // 6)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    config = make_config(inception=weights)
    config.data.update(source="folder", path=str(tmp_path))
    monkeypatch.setattr(scoring, "MAX_REFERENCE_IMAGES", 6)
    assert write_reference(config, "held_out", str(tmp_path / "ref.npz")) == 12
    found = inception.extract(inception.read_params(weights), pictures[..., None])
    with np.load(tmp_path / "ref.npz") as file:
        assert set(file.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_array_equal(file["arr_0"], pictures[::2, ..., None])
        for name, suffix in (("pool", ""), ("spatial", "_s")):
            x = np.asarray(found[name], np.float64)
            np.testing.assert_allclose(file[f"mu{suffix}"], x.mean(0), rtol=1e-4, atol=1e-5)
            covariance = np.cov(x, rowvar=False)
            assert np.abs(file[f"sigma{suffix}"] - covariance).max() < 1e-3 * np.abs(covariance).max()


def test_run_and_file_agree_with_each_other(workdir, weights, tmp_path, monkeypatch):
    """Scores of samples as they are drawn equal those of the samples that were written."""
    for name in ("load_features", "inception_features"):  # of 24 features, because 2048 take long to compare
        monkeypatch.setattr(scoring, name, lambda *_: network("inception"))
    reference, samples = str(tmp_path / "ref.npz"), str(tmp_path / "samples.npz")
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1)).astype(np.uint8))
    config = make_config(inception=weights, reference=reference)
    (run,) = evaluate_run(config, workdir, None, [1.0], samples)
    with np.load(samples) as file:
        assert file["arr_0"].shape == (24, 8, 8, 1) and file["arr_0"].dtype == np.uint8 and file["arr_0"].std() > 10
        np.testing.assert_array_equal(file["arr_1"], np.arange(24) % 10)
    found = evaluate_file(samples, reference, weights, 50_000)
    assert list(found["scores"]) == ["fid", "sfid", "is", "kid", "precision", "recall"]
    for name, value in found["scores"].items():
        np.testing.assert_allclose(value, run["scores"][name], rtol=1e-5, err_msg=name)
    assert found["scores"]["fid"] > 0 and found["settings"]["num_samples"] == 24
    assert len(found["settings"]["samples_sha256"]) == len(run["settings"]["inception_sha256"]) == 64
    assert run["settings"]["reference_sha256"] == found["settings"]["reference_sha256"]
    json.dumps([run, found])
    fewer = evaluate_file(samples, reference, weights, 10)
    assert fewer["settings"]["num_samples"] == 10 and fewer["scores"] != found["scores"]


@pytest.fixture(scope="module")
def features():
    """A convnet hardly trained: here its features need not be good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dar_jax.evaluation.features.NUM_STEPS", 80)
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
        return convnet_features(images, np.zeros(20, np.int32), 10, seed=0, cache=None)._replace(name="test")


@pytest.fixture
def convnet(monkeypatch, features):
    monkeypatch.setattr(scoring, "load_features", lambda *_: features)


def test_stopped_evaluation_goes_on(workdir, convnet, drawn, monkeypatch, capsys):
    """With the samples that are missing and no other, to the same score; another seed or scale starts anew."""
    whole = evaluate_run(make_config(), workdir, None, [1.5], None)
    assert drawn == list(range(24))
    drawn.clear()
    extract_all, calls = scoring.extract_all, []

    def stop_at_the_third(features, images, mesh):
        calls.append(len(images))
        if len(images) == 8 and calls.count(8) == 3:
            raise KeyboardInterrupt
        return extract_all(features, images, mesh)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "extract_all", stop_at_the_third)
        evaluate_run(make_config(), workdir, None, [1.5], None)
    drawn.clear()
    again = evaluate_run(make_config(), workdir, None, [1.5], None)
    assert drawn == list(range(16, 24))
    assert "going on after 16 samples" in capsys.readouterr().out
    assert scores(again) == scores(whole)
    drawn.clear()
    evaluate_run(make_config(), workdir, None, [1.5], None)
    assert drawn == list(range(24)), "a finished evaluation leaves nothing behind"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls.clear()
        patch.setattr(scoring, "extract_all", stop_at_the_third)
        evaluate_run(make_config(), workdir, None, [1.5], None)
    drawn.clear()
    config = make_config()
    config.seed = 1
    assert scores(evaluate_run(config, workdir, None, [1.5], None)) != scores(whole)
    assert drawn == list(range(24))
    drawn.clear()
    config = make_config()
    config.eval.num_samples = 12
    fewer = evaluate_run(config, workdir, None, [1.5], None)
    assert drawn == [], "the first samples of a longer evaluation are those of a shorter one"
    (drawn_anew,), (kept,) = scores(evaluate_run(config, workdir, None, [1.5], None)), scores(fewer)
    assert drawn_anew == pytest.approx(kept, rel=1e-6)
    assert drawn == list(range(12))


def test_parts_are_of_the_weights(workdir, convnet, drawn, monkeypatch, tmp_path, capsys):
    """Others under the same path and step start anew; the same ones go on in another place, but for damaged parts."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring._Shards, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate_run(make_config(), workdir, None, [1.5], None)
    moved = shutil.copytree(workdir, tmp_path / "moved")
    drawn.clear()
    before = evaluate_run(make_config(), str(moved), None, [1.5], None)
    assert drawn == []
    shutil.copytree(pathlib.Path(workdir) / "evaluation", moved / "evaluation", dirs_exist_ok=True)
    (part,) = moved.glob("evaluation/*/00000008.npz")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert scores(evaluate_run(make_config(), str(moved), None, [1.5], None)) == scores(before)
    assert drawn == list(range(8, 24)) and "00000008.npz is damaged" in capsys.readouterr().out
    shutil.copytree(pathlib.Path(workdir) / "evaluation", moved / "evaluation", dirs_exist_ok=True)
    drawn.clear()
    shutil.rmtree(moved / "checkpoints")
    config = tiny.make_config()
    config.seed = 1
    write_weights(str(moved), tiny.make_config(), jax.jit(lambda: sharding.unbox(tiny.initial(config)))())
    after = evaluate_run(make_config(), str(moved), None, [1.5], None)
    assert drawn == list(range(24)) and scores(after) != scores(before)


def test_scores_depend_on_what_they_should(workdir, convnet, drawn):
    one, three = evaluate_run(make_config(), workdir, None, [1.0, 3.0], None)
    assert one["settings"]["sampler"]["cfg_scale"] == 1 and three["settings"]["sampler"]["cfg_scale"] == 3
    assert one["scores"] != three["scores"]
    config = make_config()
    config.eval.batch_size = 16
    (other_batch,) = evaluate_run(config, workdir, None, [1.0], None)
    np.testing.assert_allclose(other_batch["scores"]["fd_test"], one["scores"]["fd_test"], rtol=1e-3)
    config = make_config(labels="random")
    (random,) = evaluate_run(config, workdir, None, [1.0], None)
    assert random["scores"] != one["scores"] and random["settings"]["labels"] == "random"
    lines = table([one, three]).splitlines()
    assert lines[0].split() == ["cfg_scale", "fd_test"]
    assert [float(line.split()[0]) for line in lines[1:]] == [1, 3]
    assert float(lines[2].split()[1]) == pytest.approx(three["scores"]["fd_test"], rel=1e-4)


def test_runs_that_cannot_be_scored(workdir, weights, tmp_path):
    np.savez(tmp_path / "large.npz", np.zeros((5, 16, 16, 3), np.uint8))
    for fields, scales, out, message in (
        ({"inception": "none.npz"}, [1.0], None, "none.npz.* are no file. Download https://github.com/mseitzer"),
        ({}, [1.0, 2.0], str(tmp_path / "s.npz"), "--samples_out takes one guidance scale"),
        ({}, [1.0], str(tmp_path / "s.png"), r"must end in \.npz"),
        ({"inception": weights, "reference": str(tmp_path / "large.npz")}, [1.0], None, "16 x 16, but .* of 8 x 8"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_run(make_config(**fields), workdir, None, scales, out)
    config = make_config()
    config.model.update(channels=4, space="latents")
    with pytest.raises(UserError, match="latents of 4 channels"):
        evaluate_run(config, workdir, None, [1.0], None)
    with pytest.raises(UserError, match=r"--inception is required to write a reference. Download"):
        write_reference(make_config(), "test", str(tmp_path / "r.npz"))
    assert not (tmp_path / "s.npz").exists()


def test_detail_of_a_run_is_that_of_its_samples(workdir, drawn, tmp_path, monkeypatch):
    """Also when it is stopped and goes on. Without a reference real images are the held-out ones of the run's data."""
    config, samples, reference = make_config(), str(tmp_path / "samples.npz"), str(tmp_path / "ref.npz")
    per_image, calls = scoring.detail.per_image, []

    def stop_at_the_last(images):
        calls.append(len(images))
        if calls.count(8) == 3:
            raise KeyboardInterrupt
        return per_image(images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring.detail, "per_image", stop_at_the_last)
        detail_of_run(config, workdir, None, {}, samples)
    drawn.clear()
    real, run = detail_of_run(config, workdir, None, {}, samples)
    assert drawn == list(range(16, 24))
    images, _ = load_images(config.data, config.data.eval_split, channels=1)
    np.savez(reference, images)
    real_of_file, teacher, file = detail_of_file(samples, reference, {"teacher": samples}, "", 50_000)
    assert [x["name"] for x in (real, run, teacher)] == ["reference", "samples", "teacher"]
    assert real["scores"] == pytest.approx(real_of_file["scores"], rel=1e-9)
    assert run["scores"] == pytest.approx(teacher["scores"], rel=1e-9)
    assert set(file["scores"]) - set(run["scores"]) == {"lsd_low_teacher", "lsd_mid_teacher", "lsd_high_teacher"}
    assert file["scores"]["lsd_high"] > 0 == file["scores"]["lsd_high_teacher"]
    assert set(run["not_available"]) == {"grid_8", "grid_16", "patch_fid"}
    assert run["settings"]["weights_sha256"] and file["settings"]["num_samples"] == 24
    json.dumps([real, run, file])


def test_other_labels_are_told(workdir, tmp_path, capsys):
    """Then image i of the two sets has nothing in common; without labels in a file nothing is said."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1)).astype(np.uint8)
    labels = np.arange(24) % 10
    np.savez(tmp_path / "same.npz", images, labels)
    np.savez(tmp_path / "none.npz", images)
    np.savez(tmp_path / "other.npz", images, labels[::-1])
    same, none, other = (str(tmp_path / f"{name}.npz") for name in ("same", "none", "other"))
    detail_of_run(make_config(), workdir, None, {"teacher": same, "none": none}, None)
    detail_of_file(same, none, {"teacher": same, "none": none}, "", 24)
    assert "warning" not in capsys.readouterr().out
    detail_of_run(make_config(), workdir, None, {"teacher": other}, None)
    assert f'warning: --teacher_samples = "{other}" has other labels' in capsys.readouterr().out
    detail_of_file(same, none, {"student": other}, "", 24)
    assert f'warning: --beside = "{other}" has other labels' in capsys.readouterr().out


def test_patch_fid_is_of_the_centres(weights, tmp_path, monkeypatch):
    """Of images above 299 px, grey here, with a network of 24 features; without weights it is not available."""
    features = network("inception")
    monkeypatch.setattr(scoring, "inception_features", lambda *_: features)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, high, (30, 303, 308, 1)).astype(np.uint8) for high in (256, 200))
    for name, images in (("a", a), ("b", b)):
        np.savez(tmp_path / f"{name}.npz", images)
    paths = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    real, samples = detail_of_file(*paths, {}, weights, 50_000)
    pools = [np.asarray(features.extract(x[:, 2:301, 4:303])["pool"]) for x in (b, a)]
    expected = frechet_distance(*(Statistics(30, x.mean(0), np.cov(x.T)) for x in np.float64(pools)))
    assert samples["scores"]["patch_fid"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert "patch_fid" not in samples["intervals"] and real["not_available"] == {}
    assert len(samples["settings"]["inception_sha256"]) == 64
    real, samples = detail_of_file(*paths, {}, "", 10)
    assert samples["not_available"] == {"patch_fid": "it needs --inception"} and "patch_fid" not in samples["scores"]


def test_detail_that_cannot_be_measured(workdir, tmp_path):
    np.savez(tmp_path / "large.npz", np.zeros((24, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "few.npz", np.zeros((5, 8, 8, 1), np.uint8))
    large, few = str(tmp_path / "large.npz"), str(tmp_path / "few.npz")
    for others, message in (
        ({"teacher": large}, r'--teacher_samples = ".*large.npz" has images of 16 x 16, but .* of 8 x 8'),
        ({"routed": few}, r'--beside = ".*few.npz" has 5 images, but .* 24 samples; give --num_samples=5'),
        ({"routed": "none.npz"}, '--beside = "none.npz" is no file'),
    ):
        with pytest.raises(UserError, match=message):
            detail_of_run(make_config(), workdir, None, others, None)
    config = make_config()
    config.model.update(channels=4, space="latents")
    with pytest.raises(UserError, match="give --vae and --reference"):
        detail_of_run(config, workdir, None, {}, None)


def test_nan_samples_are_told(workdir, convnet, monkeypatch):
    restore = scoring.restore

    def broken(*args):
        ema, step = restore(*args)
        return jax.tree.map(lambda x: x * np.nan, ema), step

    monkeypatch.setattr(scoring, "restore", broken)
    with pytest.raises(UserError, match="samples 0 to 7 hold NaN or infinity"):
        evaluate_run(make_config(), workdir, None, [1.0], None)


def door(*flags):
    return subprocess.run([sys.executable, "-m", "dar_jax.evaluate", *flags], capture_output=True, text=True)


def test_the_door_scores_files(weights, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("samples", "ref"):
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8))
    flags = [f"--samples={tmp_path}/samples.npz", f"--reference={tmp_path}/ref.npz", f"--json={tmp_path}/out.json"]
    result = door(*flags, f"--inception={weights}")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text())
    header, values = result.stdout.splitlines()[-3:-1]
    assert header.split() == list(found["scores"]) == ["fid", "sfid", "is", "kid", "precision", "recall"]
    np.testing.assert_allclose([float(v) for v in values.split()], list(found["scores"].values()), rtol=1e-4)
    assert "warning: 8 images are too few for 2048 features" in result.stdout
    result = door(*flags)
    assert result.returncode == 2 and result.stderr.startswith("error: --inception is required with --samples. Down")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give one of --workdir, --samples, --write_reference"),
        (["--workdir=a", "--samples=b"], "give one of --workdir, --samples, --write_reference"),
        (["--samples=none.npz", "--reference=r.npz"], '--samples = "none.npz" is no file'),
        (["--samples=none.npz"], "--reference is required"),
        (["--write_reference=r.npz"], "--config is required"),
        (["--write_reference=r.npz", "--config=configs/digits.py"], "--inception is required to write a reference"),
        (["--workdir=configs"], '"configs/config.json" does not exist'),
        (["--workdir=configs", "--json=/proc/nowhere/x.json"], "cannot be written"),
        (["--workdir=configs", "--json=configs"], "is no file"),
        (["--workdir=configs", "--num_samples=1"], "num_samples=1"),
        (["--workdir=configs", "--figure=x.png"], "--figure needs --detail"),
        (["--samples=x.npz", "--likelihood"], "--likelihood is of a run and alone"),
        (["--workdir=configs", "--likelihood", "--cfg_scale=2"], "draws no samples; leave out --cfg_scale"),
        (["--workdir=configs", "--likelihood", "--sampler=euler"], "draws no samples; leave out --sampler"),
        (["--workdir=configs", "--detail", "--cfg_sweep=1,2"], "leave out --cfg_sweep"),
        (["--workdir=configs", "--detail", "--figure=x.jpg"], '--figure = "x.jpg" must end in .png'),
        (["--samples=a.npz", "--detail", "--beside=b.npz"], '"b.npz" must be NAME=PATH.npz'),
        (["--samples=a.npz", "--detail", "--beside=x=b.npz,x=c.npz"], '"x=c.npz" must be NAME=PATH.npz'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_door_refuses(flags, words):
    result = door(*flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and words in result.stderr, result.stderr


def test_likelihood_of_a_model_that_moves_nothing(tmp_path, capsys):
    """The head of a fresh model is zero, so its density is that of the noise: in closed form, over all held-out images.

    More images were asked for than there are; each counts once.
    """
    config = tiny.make_config()
    write_weights(str(tmp_path), config, jax.jit(lambda: sharding.unbox(tiny.initial(config)))())
    config.eval.update(num_samples=50_000, batch_size=64)
    found = likelihood_of_run(config, str(tmp_path), None)
    images, _ = load_images(config.data, config.data.eval_split, channels=1)
    x = images.astype(np.float64).reshape(len(images), -1) / 127.5 - 1
    square = (x**2).mean(axis=1) + (2 / 255) ** 2 / 12
    wanted = (0.5 * square + 0.5 * np.log(2 * np.pi)) / np.log(2) - np.log2(2 / 255)
    assert found["num_images"] == len(images) and f"has {len(images)} images" in capsys.readouterr().out
    assert found["bits_per_dim"] == pytest.approx(wanted.mean(), abs=1e-4)
    assert found["interval"] == pytest.approx(1.96 * wanted.std(ddof=1) / np.sqrt(len(images)), rel=0.05)
    assert found["half_the_steps"] == pytest.approx(found["bits_per_dim"], abs=1e-6)
    config.model.space = "latents"
    with pytest.raises(UserError, match="--likelihood is of pixels"):
        likelihood_of_run(config, str(tmp_path), None)
