"""Diagnosis inside a run: what is logged, of which weights, and that training does not notice."""

import jax
import numpy as np
import pytest

from dar_jax import models, sharding
from dar_jax.diagnosis.curves import InlineDiagnosis
from dar_jax.errors import UserError
from dar_jax.logs import read_metrics
from dar_jax.training import loop
from tests.training import tiny


def make_config(every_steps):
    config = tiny.make_config()
    config.train.num_steps = 4
    config.model.routing.chunk_size = 2
    config.diagnosis.update(every_steps=every_steps, num_images=8)
    return config


def test_run_logs_the_curves_and_trains_as_without_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tiny.all_runs_on((1, 1), tmp_path / "cache"):
        for name, every_steps in (("with", 2), ("without", 0)):
            loop.train(make_config(every_steps), str(tmp_path / name))
    runs = [read_metrics(tmp_path / name) for name in ("with", "without")]
    found = {line["step"]: line for line in runs[0] if "forward_rms/01" in line}
    assert list(found) == [2, 4]
    names = {"step", "similarity/01", *(f"{name}_rms/{k:02d}" for name in ("forward", "backward") for k in (1, 2))}
    assert found[2].keys() == names | {f"routing_entropy/{l:02d}" for l in (2, 3, 4, 5)}
    assert all(np.isfinite(list(line.values())).all() for line in found.values())
    assert all(found[4][name] != found[2][name] for name in names - {"step"})
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not any("forward_rms/01" in line for line in runs[1])
    events = EventAccumulator(str(tmp_path / "with"), size_guidance={"tensors": 0}).Reload()
    assert names - {"step"} <= set(events.Tags()["tensors"] + events.Tags()["scalars"])


def test_it_measures_the_weights_it_is_given():
    """A fresh model routes uniformly; one query set by hand is seen by its own reader, and by no other."""
    config = make_config(1)
    with sharding.use(tiny.make_mesh(1, 1)) as mesh:
        model = models.build(config.model)
        params = jax.jit(lambda: sharding.unbox(tiny.initial(config)))()
        diagnosis = InlineDiagnosis(config, model, mesh)
        fresh = diagnosis.run(params)
        entropies = [value for name, value in fresh.items() if name.startswith("routing_entropy")]
        assert entropies == pytest.approx([1.0] * 4, rel=1e-5)  # uniform
        query = params["stack"]["steps"]["query_1"]
        query["weight"] = query["weight"] + 30 * jax.random.normal(jax.random.key(0), query["weight"].shape)
        assert diagnosis.run(params)["routing_entropy/02"] < 0.9
        assert diagnosis.run(params)["routing_entropy/03"] == pytest.approx(1.0, rel=1e-5)


def test_images_must_divide_over_the_devices(tmp_path):
    config = make_config(1)
    config.diagnosis.num_images = 12
    with pytest.raises(UserError, match=r"config\.diagnosis\.num_images = 12 must be divisible by the 8 devices"):
        loop.train(config, str(tmp_path))
    assert not list(tmp_path.iterdir())
