"""The loss on held-out data: of what, the same at every call and on every mesh, and where it is logged."""

import dataclasses

import jax
import numpy as np
import pytest

from dar_jax import diffusion, sharding
from dar_jax.data.pipeline import load_images
from dar_jax.errors import UserError
from dar_jax.evaluation import validation
from dar_jax.evaluation.validation import ValidationLoss
from dar_jax.logs import read_metrics
from dar_jax.training import loop
from tests.training import tiny


def make_config(**settings):
    config = tiny.make_config()
    config.model.routing.kind, config.model.depth = "residual", 1
    config.eval.update(loss_images=48, **settings)
    return config


def measure(config, mesh_shape=(1, 1)):
    with sharding.use(tiny.make_mesh(*mesh_shape)) as mesh:
        params = jax.jit(lambda: sharding.unbox(tiny.initial(config)))()
        loss = ValidationLoss(config, mesh)
        found = loss.run(params)
        np.testing.assert_array_equal(found[1], loss.run(params)[1])
    return found, loss


def test_it_is_the_loss_of_held_out_images_on_any_mesh():
    """A fresh model predicts 0, so that the loss is the mean square of x1 - x0."""
    config = make_config()
    (mean, by_bucket), loss = measure(config)
    assert mean == pytest.approx(by_bucket.mean())
    held_out = load_images(config.data, "test", channels=1)[0].astype(np.float32) / 127.5 - 1
    x1 = np.concatenate([np.asarray(batch["x1"]) for batch in loss.batches])
    assert len(x1) == 48 and all(any(np.array_equal(x, y) for y in held_out) for x in x1)
    np.testing.assert_allclose(by_bucket, 1 + np.mean(x1**2), rtol=0.1)
    assert len(np.unique(by_bucket)) == 10  # a noise for each
    np.testing.assert_allclose(measure(config, (2, 2))[0][1], by_bucket, rtol=1e-5)


def test_times_fill_the_buckets(monkeypatch):
    process = dataclasses.replace(diffusion.build(make_config().diffusion))
    monkeypatch.setattr(diffusion.Diffusion, "loss", lambda self, predict, x1, x0, t: t)
    monkeypatch.setattr(validation.diffusion, "build", lambda section: process)
    by_bucket = measure(make_config())[0][1]
    assert (np.floor(by_bucket * 10) == np.arange(10)).all()
    np.testing.assert_allclose(by_bucket, np.arange(10) / 10 + 0.05, atol=0.02)


def test_a_run_logs_it_of_the_average_and_of_the_weights(tmp_path):
    config = make_config(every_steps=2, num_samples=0, grid_size=2)
    config.train.num_steps = 4
    with tiny.all_runs_on((1, 1), tmp_path / "cache"):
        loop.train(config, str(tmp_path / "run"))
    found = {line["step"]: line for line in read_metrics(tmp_path / "run") if "val_loss" in line}
    assert list(found) == [2, 4]
    assert {"val_loss", "val_loss_raw", "val_loss/t0.05", "val_loss/t0.95"} < set(found[4])
    assert found[4]["val_loss"] != found[4]["val_loss_raw"] and found[4]["val_loss"] != found[2]["val_loss"]
    assert not (tmp_path / "run" / "best.json").exists() or "val_loss" in (tmp_path / "run" / "best.json").read_text()


def test_a_missing_split_is_one_line(tmp_path):
    config = make_config(every_steps=2, num_samples=0)
    config.data.eval_split = "validation"
    with pytest.raises(UserError, match="validation"):
        loop.train(config, str(tmp_path))
