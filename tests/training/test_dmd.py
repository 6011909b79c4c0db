"""Distillation: gradients written out, the Gaussian case in closed form, the student's steps, exact resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.checkpoint import load_config
from dar_jax.diffusion.path import PATHS
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.objectives import dmd as distance
from dar_jax.training import dmd, loop, setup
from tests.integration.test_captions_run import lines_of
from tests.training import tiny

B, SLOW = 8, pytest.mark.slow


def make_config(**fields):
    config = tiny.make_config()
    config.algorithm = "dmd"
    config.model.routing.kind = "residual"
    config.model.label_dropout = 0.0
    config.train.batch_size = B
    config.dmd.update(num_steps=3, fake_updates=1, guidance=2.5, fake_learning_rate=1e-3)
    config.update_from_flattened_dict(fields)
    return config


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), tree)


def written_out(config, student, fake, real, drawn):
    """The student's gradient by the equations of the linear path: x1 = x + s v, and its product with d x1."""
    model = models.build(config.model, plain=True)

    def data(params, x, t, label):
        v = model.apply({"params": params}, x, t, {"label": label}).prediction
        return x + (1 - t)[:, None, None, None] * v

    label, null = drawn["condition"]["label"], jnp.full(B, config.model.num_classes)
    x1, back = jax.vjp(lambda params: data(params, drawn["x"], drawn["t"], label), student)

    def noised(t, noise):
        t = t[:, None, None, None]
        return t * x1 + (1 - t) * noise

    t, w = drawn["t_renoised"], config.dmd.guidance
    x_t = noised(t, drawn["noise"])
    with_label, without = data(real, x_t, t, label), data(real, x_t, t, null)
    seen_fake = data(fake, x_t, t, label)
    if config.dmd.decoupled:
        size = np.abs(x1 - with_label).mean(axis=(1, 2, 3), keepdims=True)
        t = drawn["t_guided"]
        x_t = noised(t, drawn["noise_guided"])
        guidance = (w - 1) * (data(real, x_t, t, label) - data(real, x_t, t, null))
        direction = (seen_fake - with_label - guidance) / size
    else:
        seen_real = without + w * (with_label - without)
        direction = (seen_fake - seen_real) / np.abs(x1 - seen_real).mean(axis=(1, 2, 3), keepdims=True)
    return back(direction / x1.size)[0]


@pytest.mark.parametrize("decoupled", [False, pytest.param(True, marks=SLOW)])
def test_gradients_of_student_and_fake_are_those_written_out(decoupled, monkeypatch):
    """With plain gradient descent the change of the weights is the gradient times the rate, 0.001."""
    monkeypatch.setattr(dmd, "make_optimizer", lambda settings, _: optax.sgd(settings.learning_rate))
    batches = []
    monkeypatch.setattr(dmd, "value_and_grad", recording(batches, dmd.value_and_grad))
    # Not compiled, because the times are float32, and compiled sines of them differ in the last bits.
    with jax.enable_x64(True), jax.disable_jit():
        config = make_config(**{"dmd.decoupled": decoupled, "model.dtype": "float64"})
        algorithm = setup.build_algorithm(config)
        state = jax.tree.map(jnp.asarray, jax.device_get(tiny.sharding.unbox(algorithm.init(jax.random.key(0)))))
        student, fake, real = (random_like(state.params, seed) for seed in range(3))
        state = state.replace(params=student, ema=student, fake=fake)
        rng = np.random.default_rng(5)
        batch = {"x1": jnp.asarray(rng.normal(size=(B, 8, 8, 1))), "condition": {"label": jnp.arange(B)}}
        new, metrics = algorithm.step(state, {"student": (), "teacher": real}, batch)

        fake_drawn, drawn = batches
        wanted = written_out(config, student, new.fake, real, drawn)
        assert relative(change(student, new.params), wanted) < 1e-8
        assert float(metrics["gap_fake_real"]) > 0 and -1 <= float(metrics["cosine_fake_real"]) <= 1

        model = models.build(config.model, plain=True)

        def loss(params):
            t = fake_drawn["t"][:, None, None, None]
            x_t = t * fake_drawn["x1"] + (1 - t) * fake_drawn["x0"]
            v = model.apply({"params": params}, x_t, fake_drawn["t"], fake_drawn["condition"]).prediction
            return jnp.mean((v - fake_drawn["x1"] + fake_drawn["x0"]) ** 2)

        assert relative(change(fake, new.fake), jax.grad(loss)(fake)) < 1e-8


def change(before, after):
    return jax.tree.map(lambda a, b: (a - b) / 1e-3, before, after)


def recording(drawn, function):
    """`function`, which keeps its drawn batches in the list `drawn`."""

    def value_and_grad(loss, params, batch, num_micro):
        drawn.append(batch)
        return function(loss, params, batch, num_micro)

    return value_and_grad


def relative(actual, wanted):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True)
    scale = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(wanted))
    return max(float(jnp.abs(a - w).max()) for a, w in pairs) / scale


def test_a_gaussian_student_reaches_a_gaussian_teacher():
    """x = mean + spread * z, and both networks exact: E[x1 | x_t] of a Gaussian is in closed form."""
    mean, spread = jnp.array([1.5, -0.5, 0.25]), jnp.array([0.3, 1.0, 2.0])
    settings, path = config_lib.default().dmd, PATHS["linear"]

    def denoise(x_t, t, mean, spread):
        t = t[:, None]
        gain = t * spread**2 / (t**2 * spread**2 + (1 - t) ** 2)
        return mean + gain * (x_t - t * mean)

    def loss(student, key):
        keys = jax.random.split(key, 3)
        x1 = student["mean"] + student["spread"] * jax.random.normal(keys[0], (256, 3))
        clean = jax.lax.stop_gradient(x1)
        t = 1 - distance.draw_levels(keys[1], 256, settings, 0)
        x_t = path.interpolate(clean, jax.random.normal(keys[2], clean.shape), t)
        frozen = jax.lax.stop_gradient(student)
        direction = distance.gradient(clean, denoise(x_t, t, **frozen), denoise(x_t, t, mean, spread))
        return distance.matching_loss(x1, direction)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))
    student = {"mean": jnp.zeros(3), "spread": jnp.ones(3)}

    def step(carry, key):
        student, state = carry
        updates, state = optimizer.update(jax.grad(loss)(student, key), state)
        return (optax.apply_updates(student, updates), state), None

    keys = jax.random.split(jax.random.key(0), 1500)
    (student, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((student, optimizer.init(student)))
    np.testing.assert_allclose(student["mean"], mean, atol=1e-2)
    np.testing.assert_allclose(jnp.abs(student["spread"]), spread, atol=1e-2)


def test_times_of_the_student():
    settings = config_lib.default().dmd
    np.testing.assert_allclose(distance.student_times(settings), [0, 0.25, 0.5, 0.75, 1])
    settings.shift = 3.0  # published: 1, .9, .75, .5, 0 as noise levels
    np.testing.assert_allclose(1 - distance.student_times(settings), [1, 0.9, 0.75, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("simulation", ["ode", "stochastic"])
def test_steps_of_a_student_that_knows_the_data(simulation):
    """A student that always answers c: its samples are c, and before step k there is (1 - t_k) of a noise on t_k c."""
    settings, path = config_lib.default().dmd, PATHS["linear"]
    settings.simulation = simulation
    times, c = distance.student_times(settings), 0.7
    x0 = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    keys = jax.random.split(jax.random.key(1), 4)

    def student(x, t):
        return jnp.full_like(x, c)

    np.testing.assert_allclose(distance.sample(student, settings, path, times, x0, keys), c)
    noise = (distance.step_inputs(student, settings, path, times, x0, keys, 2) - times[2] * c) / (1 - times[2])
    if simulation == "ode":
        np.testing.assert_allclose(noise, x0, atol=1e-5)
    else:
        assert abs(np.corrcoef(noise.ravel(), x0.ravel())[0, 1]) < 0.2 and 0.8 < noise.std() < 1.2
        alone = distance.step_inputs(student, settings, path, times, x0[1:2], keys[1:2], 2)
        np.testing.assert_allclose(noise[1:2], (alone - times[2] * c) / (1 - times[2]), atol=1e-6)


def test_noise_levels_are_annealed():
    settings = config_lib.default().dmd
    settings.update(renoise="beta", renoise_range=(0.0, 1.0), anneal_steps=100)
    first, last = (distance.draw_levels(jax.random.key(0), 20_000, settings, step) for step in (0, 100))
    assert abs(float(first.mean()) - 4 / 5.5) < 0.01  # of Beta(4, 1.5)
    assert abs(float(last.mean()) - 0.5) < 0.01 and abs(float(last.var()) - 1 / 12) < 0.01


@pytest.mark.parametrize("kind", ["full", pytest.param("fake of adapters", marks=SLOW), "one base, two adapters"])
def test_a_distillation_is_resumed_exactly_and_sampled(kind, tmp_path, capsys):
    config = tiny.make_config()
    config.model.routing.kind = "residual"
    config.train.num_steps = 2
    with tiny.all_runs_on((2, 2), tmp_path / "cache"):
        loop.train(config, str(tmp_path / "teacher"))
        fields = {"teacher": str(tmp_path / "teacher"), "dmd.fake_updates": 2, "train.num_steps": 4}
        if kind != "full":
            fields |= {"dmd.fake_rank": 2, "dmd.real_scale": 0.5}
        if kind == "one base, two adapters":
            fields |= {"lora.rank": 2}
        else:
            fields |= {"model.routing.kind": "dar", "model.routing.summary": "sum"}
        config = make_config(**fields)
        loop.train(config, str(tmp_path / "whole"))
        is_shared = kind == "one base, two adapters"
        said = "the frozen base is the EMA of step 2" if is_shared else "the teacher is the EMA of step 2"
        assert said in capsys.readouterr().out
        config.train.num_steps = 2
        loop.train(config, str(tmp_path / "parts"))
        config.train.num_steps = 4
        loop.train(config, str(tmp_path / "parts"))
        whole, parts = lines_of(tmp_path / "whole"), lines_of(tmp_path / "parts")
        names = ("loss", "loss_fake", "grad_norm", "grad_norm_fake", "cosine_fake_real", "gap_fake_real")
        assert [[line[name] for name in names] for line in whole] == [[line[name] for name in names] for line in parts]
        sample_to_file(
            load_config(str(tmp_path / "whole")), str(tmp_path / "whole"), None, ["1"], 2, str(tmp_path / "a.npz")
        )
        damaged = make_config(**fields)
        damaged.dmd.weights = f"2:{'0' * 64}"
        with pytest.raises(UserError, match=r"config\.teacher = .* does not hold what this run trains on"):
            loop.train(damaged, str(tmp_path / "other"))
        config.dmd.num_steps = 2
        with pytest.raises(UserError, match=r"config\.dmd\.num_steps = 3, not 2"):
            loop.train(config, str(tmp_path / "whole"))
