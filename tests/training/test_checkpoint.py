"""Checkpoints survive crashes in the middle of a save, and a workdir keeps to one model."""

import json
import os
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import files
from dar_jax.checkpoint import (
    CHECKSUMS,
    METADATA,
    Checkpoints,
    claim_workdir,
    latest_step,
    load_config,
    restore_ema,
    set_damaged_aside,
    weights_fingerprint,
)
from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.training.flow import TrainState


def make_state(step):
    weights = {"w": jnp.arange(4.0) + step}
    return TrainState(jnp.int32(step), weights, {"w": -weights["w"]}, ({"mu": weights["w"] * 2},))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir, *steps, keep=9):
    checkpoints = Checkpoints(str(workdir), keep)
    for step in steps:
        checkpoints.save(make_state(step), step)
    checkpoints.close()


def restore(workdir):
    """The latest undamaged state, as a new process sees it."""
    set_damaged_aside(str(workdir))
    checkpoints = Checkpoints(str(workdir), 9)
    state = checkpoints.restore(abstract(make_state(0)))
    checkpoints.close()
    return state


def test_restores_the_latest_state(tmp_path):
    assert latest_step(str(tmp_path)) is None
    save(tmp_path, 3, 5)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), make_state(5))
    assert latest_step(str(tmp_path)) == 5


def test_keeps_the_latest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def test_keeps_the_best_too(tmp_path):
    """Over a restart, and until a better one comes; the score arrives after its checkpoint was saved."""
    for steps in ({1: 7.0, 2: 5.0, 3: 6.0}, {4: 5.5, 5: 5.0, 6: 9.0}):
        checkpoints = Checkpoints(str(tmp_path), 1)
        for step, value in steps.items():
            checkpoints.save(make_state(step), step)
            checkpoints.note_score(step, "fid", value)
        checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "6"]
    assert files.read_json(tmp_path / "best.json", dict, "") == {"step": 2, "metric": "fid", "value": 5.0}
    checkpoints = Checkpoints(str(tmp_path), 1)
    for step, value in {7: 4.0, 8: 4.5}.items():
        checkpoints.save(make_state(step), step)
        checkpoints.note_score(step, "fid", value)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["7", "8"]


def test_best_that_cannot_be_compared_gives_way(tmp_path):
    """A score of another metric, or of a checkpoint that was removed."""
    checkpoints = Checkpoints(str(tmp_path), 9)
    for step, metric, value in ((1, "fd_convnet", 1.0), (2, "fid", 50.0), (3, "fid", 60.0)):
        checkpoints.save(make_state(step), step)
        checkpoints.note_score(step, metric, value)
    checkpoints.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(str(tmp_path), 9)
    checkpoints.note_score(3, "fid", 60.0)
    checkpoints.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3


def test_saving_a_step_again_leaves_it_alone(tmp_path):
    save(tmp_path, 3)
    checkpoints = Checkpoints(str(tmp_path), 9)
    checkpoints.save(make_state(99), 3)
    checkpoints.close()
    assert restore(tmp_path).step == 3


def cut_short(path, missing):
    source = path.parent / "5"
    if missing == "all":
        path.mkdir()
    else:
        shutil.copytree(source, path)
        gone = path / missing
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


@pytest.mark.parametrize(
    ("name", "missing"),
    [("7.orbax-checkpoint-tmp", "ema"), ("7", "all"), ("7", "ema"), ("7", "train"), ("7", "_CHECKPOINT_METADATA")],
)
def test_half_written_checkpoint_is_not_used(tmp_path, name, missing):
    """The last whole one is restored and sampled from, and the step can be saved anew."""
    save(tmp_path, 3, 5)
    cut_short(tmp_path / "checkpoints" / name, missing)
    assert restore_ema(str(tmp_path), abstract(make_state(0).ema))[1] == 5
    assert restore(tmp_path).step == 5
    save(tmp_path, 7)
    assert restore(tmp_path).step == 7


def flip(path, rng):
    """Changes one bit of the file `path`."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("flips", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_restored(tmp_path, flips, capsys):
    """Wherever it is in the checkpoint, the one before is restored, and the damaged one is named."""
    save(tmp_path / "whole", 3, 5)
    names = sorted(path.relative_to(tmp_path / "whole") for path in tmp_path.glob("whole/checkpoints/5/**/*"))
    names = [name for name in names if (tmp_path / "whole" / name).is_file() and name.name != "commit_success.txt"]
    rng = random.Random(0)
    for i in range(flips):
        workdir, name = tmp_path / "flipped", names[i % len(names)]
        shutil.copytree(tmp_path / "whole", workdir)
        flip(workdir / name, rng)
        ema, step = restore_ema(str(workdir), abstract(make_state(0).ema))
        state = restore(workdir)
        if name.name != METADATA:  # of which orbax needs no more than the names of the items
            assert state.step == 3, name
            assert step == (3 if "ema" in name.parts else 5) or len(name.parts) == 3, name
            assert re.search(r"5 is damaged \(.*\): renamed to damaged-5-\d+ and not used", capsys.readouterr().out)
        jax.tree.map(np.testing.assert_array_equal, (state, ema), (make_state(int(state.step)), make_state(step).ema))
        shutil.rmtree(workdir)


def test_without_an_undamaged_checkpoint(tmp_path):
    """Nothing is renamed, and a run does not begin anew; what is not read need not be whole."""
    save(tmp_path, 3, 5)
    ema = abstract(make_state(0).ema)
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "train" / "_METADATA").unlink()
    assert restore_ema(str(tmp_path), ema)[1] == 5
    with pytest.raises(UserError, match=r"no checkpoint that is not damaged: 5 \(.*train/_METADATA.*\), 3 \("):
        set_damaged_aside(str(tmp_path))
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "ema" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"steps \[5, 3\] are damaged \(.*ema/_METADATA"):
        restore_ema(str(tmp_path), ema)
    with pytest.raises(UserError, match=r"steps \[3\] are damaged"):
        restore_ema(str(tmp_path), ema, 3)
    assert latest_step(str(tmp_path)) == 5


def test_checkpoint_of_an_earlier_version(tmp_path, capsys):
    """It has no checksums; it is used, and a line says that it was not verified. What orbax cannot read is one line."""
    save(tmp_path, 3)
    fingerprint = weights_fingerprint(str(tmp_path), 3)
    (tmp_path / "checkpoints" / "3" / CHECKSUMS).unlink()
    assert restore(tmp_path).step == 3
    assert "3 has no checksums.json: it is of an earlier version" in capsys.readouterr().out
    assert weights_fingerprint(str(tmp_path), 3) == fingerprint
    (tmp_path / "checkpoints" / "3" / "ema" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match=r'checkpoint ".*/3" cannot be read'):
        restore(tmp_path)
    assert weights_fingerprint(str(tmp_path), 3) != fingerprint


def test_restore_ema_takes_the_named_step(tmp_path):
    save(tmp_path, 3, 5)
    ema, step = restore_ema(str(tmp_path), abstract(make_state(0).ema), 3)
    assert step == 3
    np.testing.assert_array_equal(ema["w"], make_state(3).ema["w"])
    with pytest.raises(UserError, match=r"no checkpoint of step 4; it has \[3, 5\]"):
        restore_ema(str(tmp_path), abstract(make_state(0).ema), 4)
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_ema(str(tmp_path / "elsewhere"), abstract(make_state(0).ema))


def test_config_survives_the_workdir(tmp_path):
    """Every field comes back with its value and its type."""
    config = default()
    config.seed, config.sampler.cfg_interval, config.model.learn_sigma = 7, (0.25, 1.0), True
    config.optimizer.update(learning_rate=1.0, weight_decay=1e-30)
    config.data.path = 'a "b"'
    claim_workdir(str(tmp_path), config)
    restored = load_config(str(tmp_path))

    def flatten(config):
        return {k: flatten(v) if hasattr(v, "items") else (type(v), v) for k, v in config.items()}

    assert flatten(restored) == flatten(config)
    assert restored.is_locked


def test_workdir_of_another_model_is_refused(tmp_path):
    """Before anything is written; what does not change the run's identity may change."""
    claim_workdir(str(tmp_path), default())
    save(tmp_path, 3)
    written = (tmp_path / "config.json").read_bytes()
    for section, field, value in (("model", "depth", 8), ("diffusion", "prediction", "noise"), (None, "seed", 1)):
        config = default()
        (config[section] if section else config)[field] = value
        with pytest.raises(UserError, match=rf"config\..*{field} = .*, not {value}; take another --workdir"):
            claim_workdir(str(tmp_path), config)
    assert (tmp_path / "config.json").read_bytes() == written
    config = default()
    config.train.num_steps = 5000
    claim_workdir(str(tmp_path), config)
    assert load_config(str(tmp_path)).train.num_steps == 5000


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        claim_workdir(str(tmp_path / "file" / "run"), default())


def test_workdir_without_config(tmp_path):
    with pytest.raises(UserError, match=r"config.json\" does not exist; --workdir must be"):
        load_config(str(tmp_path))
