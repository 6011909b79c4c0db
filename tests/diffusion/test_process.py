import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dar_jax import diffusion
from dar_jax.config import default
from dar_jax.errors import UserError


def build(**fields):
    section = default().diffusion
    section.update(fields)
    return diffusion.build(section)


def official_loss(output_fn, x1, x0, t, interpolant, prediction, weighting):
    """The official formulae in float64 NumPy, with d log(alpha) / dt as their building block."""
    t = t.reshape(-1, 1, 1, 1)
    if interpolant == "linear":
        a, s, ds, ratio = t, 1 - t, -np.ones_like(t), 1 / t
        da = np.ones_like(t)
    elif interpolant == "gvp":
        angle = np.pi * t / 2
        a, s = np.sin(angle), np.cos(angle)
        da, ds, ratio = np.pi / 2 * np.cos(angle), -np.pi / 2 * np.sin(angle), np.pi / 2 / np.tan(angle)
    else:
        log_a = -0.25 * (1 - t) ** 2 * (20 - 0.1) - 0.5 * (1 - t) * 0.1
        ratio = 0.5 * (1 - t) * (20 - 0.1) + 0.5 * 0.1
        a = np.exp(log_a)
        s = np.sqrt(1 - a**2)
        da, ds = a * ratio, -(a**2) * ratio / s
    x_t = a * x1 + s * x0
    m = output_fn(x_t, t)
    if prediction == "x":
        divisor = np.maximum(s, 0.05)
        if interpolant == "linear":
            v, v_hat = (x1 - x_t) / divisor, (m - x_t) / divisor
        else:
            shrink = np.minimum(1, s / 0.05)
            v, v_hat = (shrink * (da * x + ds * (x_t - a * x) / s) for x in (x1, m))
        return np.mean((v - v_hat) ** 2, axis=(1, 2, 3))
    if prediction == "velocity":
        return np.mean((m - (da * x1 + ds * x0)) ** 2, axis=(1, 2, 3))
    drift = ratio * s**2 - s * ds
    w = {"none": np.ones_like(t), "velocity": (drift / s) ** 2, "likelihood": drift / s**2}[weighting]
    error = m - x0 if prediction == "noise" else m * s + x0
    return np.mean(w * error**2, axis=(1, 2, 3))


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "x"])
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_loss_equals_the_official_formulae(interpolant, prediction, weighting):
    rng = np.random.default_rng(1)
    x1, x0 = rng.normal(size=(2, 5, 4, 4, 3)).astype(np.float32)
    t = np.array([0.01, 0.2, 0.5, 0.8, 0.97], np.float32)

    def predict(x_t, t):
        assert t.shape == (5,)
        return jnp.sin(2 * x_t) + t.reshape(-1, 1, 1, 1)

    process = build(interpolant=interpolant, prediction=prediction, weighting=weighting)
    loss = process.loss(predict, *map(jnp.asarray, (x1, x0, t)))
    expected = official_loss(
        lambda x, t: np.sin(2 * x) + t,
        *(v.astype(np.float64) for v in (x1, x0, t)),
        interpolant,
        prediction,
        weighting,
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "x"])
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_loss_and_gradient_are_finite_at_the_ends_of_time(interpolant, prediction, weighting):
    process = build(interpolant=interpolant, prediction=prediction, weighting=weighting)
    t = jnp.asarray(process.prediction.time_range(sampling=False), jnp.float32)
    x1, x0 = jnp.ones((2, 2, 2, 1)), -jnp.ones((2, 2, 2, 1))

    def loss(scale):
        return process.loss(lambda x, t: scale * x, x1, x0, t).sum()

    assert np.isfinite(jax.value_and_grad(loss)(0.5)).all()


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
def test_velocity_loss_is_the_same_for_equivalent_outputs(interpolant):
    rng = np.random.default_rng(2)
    x1, x0 = jnp.asarray(rng.normal(size=(2, 4, 3, 3, 1)), jnp.float32)
    t = jnp.array([0.1, 0.4, 0.7, 0.9])
    # A network whose data is 0.3 x_t + t, and its velocity, noise and score.
    path = build(interpolant=interpolant).path
    a, s, da, ds = (np.asarray(f(t)).reshape(-1, 1, 1, 1) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))

    def outputs(x_t, t):
        data = 0.3 * x_t + t.reshape(-1, 1, 1, 1)
        noise = (x_t - a * data) / s
        return {"x": data, "noise": noise, "score": -noise / s, "velocity": da * data + ds * noise}

    x_t = a * x1 + s * x0
    error = outputs(x_t, t)["velocity"] - (da * x1 + ds * x0)
    expected = np.mean(np.square(error), axis=(1, 2, 3))
    for prediction in ("velocity", "score", "noise", "x"):
        process = build(interpolant=interpolant, prediction=prediction, weighting="likelihood")
        found = process.velocity_loss(lambda x, t, name=prediction: outputs(x, t)[name], x1, x0, t)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16_output_gives_a_float32_loss():
    x = jnp.ones((2, 2, 2, 1))
    loss = build().loss(lambda x, t: x.astype(jnp.bfloat16), x, x, jnp.full(2, 0.5))
    assert loss.dtype == jnp.float32


def test_uniform_time_fills_the_training_range():
    t, x0 = build(prediction="noise").draw(jax.random.key(0), jnp.zeros((20000, 1, 1, 1)))
    assert t.dtype == x0.dtype == jnp.float32
    assert t.min() >= 1e-3 and t.max() <= 1 - 1e-3
    assert stats.kstest(np.asarray(t), stats.uniform(1e-3, 1 - 2e-3).cdf).pvalue > 1e-3
    assert stats.kstest(np.asarray(x0).ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(t, np.asarray(x0).ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("interpolant, end", [("linear", 1.0), ("vp", 1 - 1e-5)])
def test_logit_normal_time(interpolant, end):
    process = build(time="logit_normal", time_mean=-0.8, time_std=0.6, interpolant=interpolant)
    t, _ = process.draw(jax.random.key(1), jnp.zeros((20000, 1, 1, 1)))
    unit = np.asarray(t, np.float64) / end
    logit = np.log(unit / (1 - unit))
    assert stats.kstest(logit, stats.norm(-0.8, 0.6).cdf).pvalue > 1e-3


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shifted_time(shift):
    """Its distribution: t <= x where the uniform u has shift u / (1 + (shift - 1) u) >= 1 - x."""
    t, _ = build(time="shifted", time_shift=shift).draw(jax.random.key(2), jnp.zeros((20000, 1, 1, 1)))
    assert t.min() >= 0 and t.max() <= 1

    def distribution(x):
        return 1 - (1 - x) / (shift - (shift - 1) * (1 - x))

    assert stats.kstest(np.asarray(t, np.float64), distribution).pvalue > 1e-3
    assert np.mean(t < 0.5) == pytest.approx(shift / (1 + shift), abs=0.015)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"interpolant": "liner"}, 'config.diffusion.interpolant = "liner".*"linear"'),
        ({"prediction": "nois"}, '"nois".*"noise"'),
        ({"weighting": "likelyhood"}, '"likelyhood".*"likelihood"'),
        ({"time": "logit_norm"}, '"logit_norm".*"logit_normal"'),
    ],
)
def test_bad_values_are_user_errors_of_one_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        build(**fields)
    assert "\n" not in str(error.value)


def test_an_output_of_another_shape_is_an_error():
    x = jnp.zeros((2, 2, 2, 1))
    for prediction in ("velocity", "noise"):
        with pytest.raises(ValueError, match="shape"):
            build(prediction=prediction).loss(lambda x, t: x[..., :0], x, x, jnp.full(2, 0.5))
