"""How far states agree with the target of REPA, by depth: against NumPy, and where there is no target."""

import jax
import numpy as np
import pytest

from dar_jax import models, sharding
from dar_jax.diagnosis.curves import InlineDiagnosis
from dar_jax.diagnosis.forward import forward
from dar_jax.diagnosis.pairs import noise
from dar_jax.objectives.hog import hog
from tests.training import tiny


def make_config(**repa):
    config = tiny.make_config()
    config.model.patch_size = 2
    config.model.routing.chunk_size = 2
    config.diagnosis.update(every_steps=1, num_images=8)
    config.repa.update({"target": "hog", "block": 1, **repa})
    return config


def diagnose(config):
    with sharding.use(tiny.make_mesh(1, 1)) as mesh:
        params = jax.jit(lambda: sharding.unbox(tiny.initial(config)))()
        diagnosis = InlineDiagnosis(config, models.build(config.model), mesh)
        return diagnosis, params, diagnosis.run(params)


def cka(a, b):
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return np.sum((a.T @ b) ** 2) / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))


def test_it_is_the_cka_of_states_and_features():
    config = make_config()
    diagnosis, params, found = diagnose(config)
    batch, t = jax.device_get(diagnosis.batch), diagnosis.t
    x0 = np.asarray(noise(config.seed, batch["index"], batch["x1"].shape[1:]))
    x_t = t[:, None, None, None] * batch["x1"] + (1 - t[:, None, None, None]) * x0
    model = models.build(config.model)
    states = np.asarray(jax.jit(lambda x: forward(model, params, x, t, batch["condition"])[1].states)(x_t))
    target = np.asarray(hog(batch["x1"], 4))
    for block in (1, 2):
        expected = np.mean([cka(states[2 * block, i], target[i]) for i in range(8)])
        assert found[f"alignment/{block:02d}"] == pytest.approx(expected, rel=1e-4)


def test_a_target_that_cannot_be_had_is_told(capsys):
    _, _, found = diagnose(make_config(target="encoder"))
    assert "the alignment is not measured: config.repa.weights" in capsys.readouterr().out
    assert "similarity/01" in found and not any(name.startswith("alignment") for name in found)


def test_a_state_as_target_is_no_curve():
    config = make_config(target="later_block", later_block=2)
    config.model.depth = 3
    assert not any(name.startswith("alignment") for name in diagnose(config)[2])
