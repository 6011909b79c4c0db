"""An algorithm that no other code knows: two networks with an optimizer each, and a frozen third one.

It goes through the loop, the checkpoints, an exact resume, the samples inside training and the planner.
"""

import functools
import itertools
import json
import os
import signal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from dar_jax import models, objectives, planning, sharding
from dar_jax.logs import Logs
from dar_jax.planning import plan as plan_module
from dar_jax.training import loop
from dar_jax.training.algorithm import Algorithm
from dar_jax.training.setup import set_up
from dar_jax.training.update import averaged, value_and_grad
from tests.training import tiny


class PairState(flax.struct.PyTreeNode):
    step: Array
    params: dict
    ema: dict
    critic: dict
    student_optimizer: optax.OptState
    critic_optimizer: optax.OptState


class Critic(nn.Module):
    """Guesses the student's squared distance from the teacher: x_t `[B, H, W, C]` -> `[B]`."""

    @nn.compact
    def __call__(self, x_t):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("patch", "embed"))
        hidden = nn.tanh(nn.Dense(8, kernel_init=kernel)(x_t.reshape(len(x_t), -1)))
        return nn.Dense(1, kernel_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "patch")))(hidden)[
            :, 0
        ]


def build(config):
    """The student learns from data and from the teacher, and the critic from the student, every second step."""
    objective, critic = objectives.build(config), Critic()
    model = models.build(config.model)
    student_optimizer, critic_optimizer = optax.adam(1e-3), optax.sgd(1e-2)
    image = jnp.zeros((1, config.model.input_size, config.model.input_size, config.model.channels))

    def init(key):
        params = objective.init(key)
        other = critic.init(key, image)["params"]
        return PairState(
            jnp.int32(0),
            params,
            jax.tree.map(jnp.copy, params),
            other,
            student_optimizer.init(params),
            critic_optimizer.init(other),
        )

    def step(state, frozen, batch):
        drawn = objective.draw(jax.random.fold_in(jax.random.key(config.seed), state.step), state.step, (), batch)
        x_t = drawn["t"][:, None, None, None] * drawn["x1"]

        def distances(params):
            outputs = [
                model.apply({"params": p}, x_t, drawn["t"], drawn["condition"]).prediction
                for p in (params, frozen["teacher"])
            ]
            return jnp.mean((outputs[0] - outputs[1]) ** 2, axis=(1, 2, 3))

        def student_loss(params, drawn):
            loss, _ = objective.loss(params, drawn)
            return loss + 0.1 * jnp.mean(distances(params)), {"teacher_distance": jnp.mean(distances(params))}

        metrics, grads = value_and_grad(student_loss, state.params, drawn, 1)
        updates, student_state = student_optimizer.update(grads, state.student_optimizer)
        params = optax.apply_updates(state.params, updates)

        def critic_loss(other):
            return jnp.mean((critic.apply({"params": other}, x_t) - jax.lax.stop_gradient(distances(params))) ** 2)

        value, critic_grads = jax.value_and_grad(critic_loss)(state.critic)
        updates, critic_state = critic_optimizer.update(critic_grads, state.critic_optimizer)
        active = state.step % 2 == 0  # two time scales
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)  # noqa: E731
        other = keep(optax.apply_updates(state.critic, updates), state.critic)
        critic_state = keep(critic_state, state.critic_optimizer)
        new = PairState(state.step + 1, params, averaged(state.ema, params, 0.9), other, student_state, critic_state)
        return new, {**metrics, "loss_critic": value, "param_norm": optax.global_norm(params)}

    def init_frozen(key):
        return {"teacher": objective.init(jax.random.fold_in(key, 1))}

    return Algorithm(init, step, objective.sample, init_frozen)


def make_config():
    config = tiny.make_config()
    config.model.depth, config.model.routing.kind = 1, "residual"  # compiles sooner
    config.train.num_steps = 6
    config.checkpoint.every_steps = 2
    config.eval.update(every_steps=6, num_samples=0, grid_size=2)
    return config


@pytest.fixture
def pair(monkeypatch):
    for module in (loop, plan_module):
        monkeypatch.setattr(module, "build_algorithm", build)


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "loss_critic", "teacher_distance", "param_norm")
    return {line["step"]: [line[name] for name in names] for line in lines if "loss" in line}


def test_it_runs_resumes_exactly_and_is_sampled(pair, tmp_path, monkeypatch, capsys):
    with tiny.all_runs_on((2, 2), tmp_path / "cache"):
        loop.train(make_config(), str(tmp_path / "whole"))
        assert (tmp_path / "whole" / "samples" / "00000006.png").exists()
        assert "loss_critic" in capsys.readouterr().out  # every loss is on the progress line

        progress = Logs.progress

        def stop_at_three(self, step, scalars):
            progress(self, step, scalars)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Logs, "progress", stop_at_three)
            loop.train(make_config(), str(tmp_path / "stopped"))
        assert "stopped by a signal" in capsys.readouterr().out
        loop.train(make_config(), str(tmp_path / "stopped"))
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert list(logged(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6]
    # The critic's optimizer is another one at another pace: what it guesses changes in every second step only.
    saved = sorted(int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert saved[-1] == 6


def test_frozen_networks_are_neither_donated_nor_saved(pair):
    config = make_config()
    mesh = tiny.make_mesh(2, 2)
    with sharding.use(mesh):
        run = set_up(config, build(config), mesh)
        state, frozen = run.init(), run.load_frozen()
        before = jax.device_get(frozen)
        for batch in tiny.batches(config, 3):
            state, _ = run.step(state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen))
    assert not any("teacher" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state))
    # Its large arrays are split over fsdp as those of the student.
    kernel = frozen["teacher"]["patch"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def test_critic_moves_in_every_second_step(pair):
    config, mesh = make_config(), tiny.make_mesh(1, 1)
    with sharding.use(mesh):
        run = set_up(config, build(config), mesh)
        state, frozen, critics = run.init(), run.load_frozen(), []
        for batch in tiny.batches(config, 4):
            critics.append(jax.device_get(state.critic))
            state, _ = run.step(state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
        critics.append(jax.device_get(state.critic))
    moved = [
        any(np.any(a != b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
        for old, new in itertools.pairwise(critics)
    ]
    assert moved == [True, False, True, False]


def test_planner_knows_it(pair):
    found = planning.make_plan(make_config(), "cpu:8")
    sizes = functools.partial(found.memory_bytes.get)
    assert sizes("frozen") == sizes("params") == sizes("ema") > 0
    assert sizes("optimizer") > 2 * sizes("params")  # Adam's two moments and the critic
