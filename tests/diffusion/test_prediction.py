import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.diffusion.interpolant import get_interpolant, time_range, to_noise, to_score, to_velocity
from dar_jax.errors import UserError

NAMES = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "score", "noise")


def reference_alpha(name, t):
    return {
        "linear": t,
        "gvp": np.sin(np.pi * t / 2),
        "vp": np.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)),
    }[name]


def reference_sigma(name, t):
    return 1 - t if name == "linear" else np.sqrt(1 - reference_alpha(name, t) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_equal_the_definition_and_derivatives_equal_differences(name):
    interpolant = get_interpolant(name)
    t, h = np.linspace(0.001, 0.999, 101), 1e-6
    with jax.enable_x64(True):
        np.testing.assert_allclose(interpolant.alpha(jnp.asarray(t)), reference_alpha(name, t), rtol=1e-12)
        np.testing.assert_allclose(interpolant.sigma(jnp.asarray(t)), reference_sigma(name, t), rtol=1e-9)
        for reference, derivative in (
            (reference_alpha, interpolant.d_alpha),
            (reference_sigma, interpolant.d_sigma),
        ):
            differences = (reference(name, t + h) - reference(name, t - h)) / (2 * h)
            np.testing.assert_allclose(derivative(jnp.asarray(t)), differences, rtol=1e-5, atol=1e-8)


def test_vp_starts_almost_at_noise():
    assert abs(float(get_interpolant("vp").alpha(jnp.float32(0))) - 0.00657) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampling", [False, True])
def test_conversions_recover_the_pair_at_the_ends_of_the_range(name, prediction, sampling):
    t0, t1 = time_range(name, prediction, sampling=sampling)
    t = np.array([t0, 0.3, 0.7, t1])
    rng = np.random.default_rng(0)
    x1, x0 = rng.normal(size=(2, 4, 3, 3, 2))

    with jax.enable_x64(True):
        interpolant = get_interpolant(name)
        # At t1 of VP training sigma is 1e-3: its own float64 rounding, not the reference's, must decide.
        shape = (4, 1, 1, 1)
        coefficients = (interpolant.alpha, interpolant.sigma, interpolant.d_alpha, interpolant.d_sigma)
        a, s, da, ds = (np.asarray(f(jnp.asarray(t))).reshape(shape) for f in coefficients)
        x_t, velocity = a * x1 + s * x0, da * x1 + ds * x0
        output = {"velocity": velocity, "noise": x0, "score": -x0 / np.where(s > 0, s, np.nan)}[prediction]
        args = (jnp.asarray(output), jnp.asarray(x_t), jnp.asarray(t), interpolant, prediction)
        np.testing.assert_allclose(to_noise(*args), x0, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(to_velocity(*args), velocity, rtol=1e-7, atol=1e-7)
        inside = t < 1
        expected = -x0[inside] / s[inside]
        np.testing.assert_allclose(to_score(*args)[inside], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_velocity_and_noise_are_finite_on_the_whole_range(name, prediction):
    t0, t1 = time_range(name, prediction, sampling=False)
    t = jnp.asarray(np.linspace(t0, t1, 4), jnp.float32)
    x = jnp.ones((4, 2, 2, 1), jnp.float32)
    for convert in (to_noise, to_velocity):
        assert np.isfinite(convert(x, x, t, get_interpolant(name), prediction)).all()


def test_time_range_is_the_official_one():
    assert time_range("linear", "velocity", sampling=False) == (0.0, 1.0)
    assert time_range("gvp", "velocity", sampling=True) == (0.0, 1.0)
    assert time_range("gvp", "score", sampling=False) == (1e-3, 1 - 1e-3)
    assert time_range("linear", "noise", sampling=True) == (1e-3, 1 - 1e-3)
    assert time_range("vp", "velocity", sampling=False) == (0.0, 1 - 1e-5)
    assert time_range("vp", "noise", sampling=True) == (0.0, 1 - 1e-3)


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match=r'"liner".*"linear"'):
        get_interpolant("liner")
    with pytest.raises(UserError, match=r'"nois".*"noise"'):
        time_range("linear", "nois", sampling=True)
