import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.diffusion.path import PATHS
from dar_jax.diffusion.prediction import PREDICTIONS


def reference_alpha(name, t):
    return {
        "linear": t,
        "gvp": np.sin(np.pi * t / 2),
        "vp": np.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)),
    }[name]


def reference_sigma(name, t):
    return 1 - t if name == "linear" else np.sqrt(1 - reference_alpha(name, t) ** 2)


@pytest.mark.parametrize("name", PATHS)
def test_coefficients_equal_the_definition_and_derivatives_equal_differences(name):
    path = PATHS[name]
    t, h = np.linspace(0.001, 0.999, 101), 1e-6
    with jax.enable_x64(True):
        np.testing.assert_allclose(path.alpha(jnp.asarray(t)), reference_alpha(name, t), rtol=1e-12)
        np.testing.assert_allclose(path.sigma(jnp.asarray(t)), reference_sigma(name, t), rtol=1e-9)
        for reference, derivative in (
            (reference_alpha, path.d_alpha),
            (reference_sigma, path.d_sigma),
        ):
            differences = (reference(name, t + h) - reference(name, t - h)) / (2 * h)
            np.testing.assert_allclose(derivative(jnp.asarray(t)), differences, rtol=1e-5, atol=1e-8)


def test_vp_starts_almost_at_noise():
    assert abs(float(PATHS["vp"].alpha(jnp.float32(0))) - 0.00657) < 1e-5


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampling", [False, True])
def test_conversions_recover_the_pair_at_the_ends_of_the_range(name, prediction, sampling):
    path, predicted = PATHS[name], PREDICTIONS[prediction](PATHS[name])
    t0, t1 = predicted.time_range(sampling=sampling)
    t = np.array([t0, 0.3, 0.7, t1])
    rng = np.random.default_rng(0)
    x1, x0 = rng.normal(size=(2, 4, 3, 3, 2))

    with jax.enable_x64(True):
        # At t1 of VP training sigma is 1e-3: its own float64 rounding, not the reference's, must decide.
        shape = (4, 1, 1, 1)
        coefficients = (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
        a, s, da, ds = (np.asarray(f(jnp.asarray(t))).reshape(shape) for f in coefficients)
        x_t, velocity = a * x1 + s * x0, da * x1 + ds * x0
        inside = t < 1
        score = -x0 / np.where(s > 0, s, np.nan)
        output = {"velocity": velocity, "noise": x0, "score": score, "x": x1}[prediction]
        args = (jnp.asarray(output), jnp.asarray(x_t), jnp.asarray(t))
        np.testing.assert_allclose(predicted.score(*args)[inside], score[inside], rtol=1e-7, atol=1e-7)
        if prediction == "x":
            # The velocity shrinks where sigma < .05, and without noise x1 says nothing about x0.
            velocity *= np.minimum(1, s / 0.05)
            np.testing.assert_allclose(predicted.noise(*args)[inside], x0[inside], rtol=1e-7, atol=1e-9)
        else:
            np.testing.assert_allclose(predicted.noise(*args), x0, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(predicted.velocity(*args), velocity, rtol=1e-7, atol=1e-7)
        pair = map(jnp.asarray, (x1, x0, x_t, t))
        np.testing.assert_allclose(predicted.target(*pair), velocity, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(path.interpolate(*map(jnp.asarray, (x1, x0, t))), x_t, rtol=1e-12)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_conversions_are_finite_on_the_whole_range(name, prediction):
    predicted = PREDICTIONS[prediction](PATHS[name])
    t0, t1 = predicted.time_range(sampling=False)
    sde_end = 1 - 1e-3
    x = jnp.ones((4, 2, 2, 1), jnp.float32)
    for convert, end in ((predicted.velocity, t1), (predicted.noise, min(t1, sde_end)), (predicted.score, sde_end)):
        t = jnp.asarray(np.linspace(t0, end, 4), jnp.float32)
        assert np.isfinite(convert(x, x, t)).all()


@pytest.mark.parametrize(
    "name, prediction, sampling, expected",
    [
        ("linear", "velocity", False, (0.0, 1.0)),
        ("gvp", "velocity", True, (0.0, 1.0)),
        ("linear", "x", False, (0.0, 1.0)),
        ("gvp", "x", True, (0.0, 1.0)),
        ("gvp", "score", False, (1e-3, 1 - 1e-3)),
        ("linear", "noise", True, (1e-3, 1 - 1e-3)),
        ("vp", "velocity", False, (0.0, 1 - 1e-5)),
        ("vp", "x", False, (0.0, 1 - 1e-5)),
        ("vp", "noise", True, (0.0, 1 - 1e-3)),
    ],
)
def test_time_range_is_the_official_one(name, prediction, sampling, expected):
    assert PREDICTIONS[prediction](PATHS[name]).time_range(sampling=sampling) == expected
