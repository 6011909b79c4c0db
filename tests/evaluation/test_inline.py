"""Evaluation inside a run: which samples are scored, when, and what is said without Inception weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax import files
from dar_jax.evaluation import in_training
from dar_jax.evaluation.features import Features
from dar_jax.logs import read_metrics
from dar_jax.training import loop
from tests.training import tiny


def make_config():
    config = tiny.make_config()
    config.train.update(num_steps=6, log_every_steps=6)
    config.checkpoint.update(every_steps=6, keep=1)
    config.eval.update(every_steps=2, num_samples=12, final_samples=20, grid_size=2)
    return config


def spied(seen):
    """What stands in for the feature network: one of 4 features that keeps what it was given."""

    def extract(images):
        x = images.astype(jnp.float32).reshape(len(images), 4, -1)
        return {"pool": x.mean(-1) / 255}

    def spy(features, images, mesh):
        seen.append(images)
        return {name: np.asarray(x) for name, x in extract(images).items()}

    return {"load_features": lambda *_: Features("test", extract, 8), "extract_all": spy}


@pytest.fixture
def network(programs, monkeypatch):
    seen = []
    for name, value in spied(seen).items():
        monkeypatch.setattr(in_training, name, value)
    return seen


def test_run_scores_samples_and_keeps_the_best_checkpoint(network, tmp_path, capsys):
    loop.train(make_config(), str(tmp_path))
    lines = read_metrics(tmp_path)
    found = {line["step"]: line for line in lines if "fd_test" in line}
    assert list(found) == [2, 4, 6]
    assert [set(line) - {"step"} for line in found.values()] == [{"fd_test"}, {"fd_test"}, {"fd_test", "fd_test_20"}]
    best = min(found, key=lambda step: found[step]["fd_test"])
    assert files.read_json(tmp_path / "best.json", dict, "") == {
        "step": best, "metric": "fd_test", "value": found[best]["fd_test"],
    }  # fmt: skip
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {str(best), "6"} <= kept and len(kept) < 3  # of three saved; the best before the last may outlive the run
    assert "fd_test_20" in capsys.readouterr().out

    assert len(np.concatenate(network)) == 12 + 12 + 20
    with Image.open(tmp_path / "samples" / "00000006.png") as picture:
        corner = np.asarray(picture)[:8, :8]
    assert corner.shape == (8, 8)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with tiny.all_runs_on((1, 1), tmp_path_factory.mktemp("cache")):
        yield


def results(workdir):
    """All that the evaluations of a run leave behind: lines, grids, the best and the checkpoints."""
    lines = [line for line in read_metrics(str(workdir)) if in_training.is_evaluation(line)]
    grids = {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}
    checkpoints = {path.name for path in (workdir / "checkpoints").iterdir()}
    return lines, grids, json.loads((workdir / "best.json").read_text()), checkpoints


@pytest.fixture(scope="module")
def undisturbed(programs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in spied([]).items():
            patch.setattr(in_training, name, value)
        loop.train(make_config(), str(workdir))
    return results(workdir)


@pytest.mark.parametrize(
    ("step", "where"),
    [(2, "InlineEvaluation.run"), (4, "Checkpoints.note_score"), (6, "Logs.write")],
)
def test_stopped_evaluation_is_made_up_for(undisturbed, network, tmp_path, monkeypatch, capsys, step, where):
    """Wherever it stops, the next start leaves the same behind as a run that was not disturbed, and the one after it
    has nothing to do."""
    owner, name = where.split(".")
    owner = {"InlineEvaluation": loop.InlineEvaluation, "Checkpoints": loop.Checkpoints, "Logs": loop.Logs}[owner]
    original = getattr(owner, name)

    def stop(self, *args):
        if step in args and not any("loss" in x for x in args if isinstance(x, dict)):
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stop)
        loop.train(make_config(), str(tmp_path))
    assert all(line["step"] < step for line in read_metrics(str(tmp_path)) if in_training.is_evaluation(line))
    loop.train(make_config(), str(tmp_path))
    assert f"making up for the evaluation of step {step}," in capsys.readouterr().out
    for found, wanted in zip(results(tmp_path), undisturbed, strict=True):
        assert found == wanted
    loop.train(make_config(), str(tmp_path))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("grid_size", "num_samples"), [(2, 12), (5, 12), (2, 0)])
def test_scored_samples_are_the_first_ones(network, tmp_path, monkeypatch, grid_size, num_samples):
    """num_samples of them, at the end final_samples that begin with them; the grid may need more or fewer."""

    def draw(params, index, label):  # sample i is as bright as i, of the grid's number of channels
        return jnp.broadcast_to(index[:, None, None, None] / 127.5 - 1, (len(index), 8, 8, 1))

    monkeypatch.setattr(in_training, "make_sampler", lambda *_: draw)
    config, mesh = make_config(), tiny.make_mesh(1, 1)
    config.eval.update(grid_size=grid_size, num_samples=num_samples)
    evaluation = in_training.InlineEvaluation(config, None, mesh, str(tmp_path), print)
    for step, count in ((2, num_samples), (6, 20 if num_samples else 0)):
        network.clear()
        found = evaluation.run({}, step)
        brightness = [image[0, 0, 0] for batch in network for image in batch]
        np.testing.assert_array_equal(brightness, np.arange(count))
    assert list(found) == (["fd_test", "fd_test_20"] if num_samples else [])
    with Image.open(tmp_path / "samples" / "00000006.png") as picture:
        pixels = np.asarray(picture)
        side = len(pixels) // grid_size
        shown = pixels[side // 2 :: side + 1, side // 2 :: side + 1][:grid_size, :grid_size]
    np.testing.assert_array_equal(shown.ravel(), np.arange(grid_size**2))


def test_batches_are_cut_at_the_stops():
    pieces = list(in_training._split_at([np.arange(5), np.arange(5, 10), np.arange(10, 13)], (3, 10, 12, 99)))
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9], [10, 11], [12]]


def test_without_weights_a_line_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(in_training, "convnet_features", lambda *_, **__: "the convnet")
    lines = []
    assert in_training.load_features(tiny.make_config(), None, str(tmp_path), lines.append) == "the convnet"
    (line,) = lines
    assert "config.eval.inception" in line and "fd_convnet" in line and "\n" not in line
    assert "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05" in line
    assert "python -m dar_jax.convert --kind=inception --input=pt_inception-2015-12-05-6726825d.pth" in line
