"""Of data N(MEAN, STD^2) velocity, ODE solution and SDE marginals are known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.integrate import solve_ivp

from dar_jax import diffusion
from dar_jax.conditions import Labels
from dar_jax.config import default
from dar_jax.diffusion.guidance import guided
from dar_jax.diffusion.sampler import METHODS, build, dopri5, num_evaluations
from dar_jax.diffusion.schedule import shift_of
from dar_jax.errors import UserError

INTERPOLANTS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "score", "noise", "x")
MEAN, STD = 0.7, 0.5


def configs(**fields):
    config = default()
    for name, value in fields.items():
        (config.diffusion if name in config.diffusion else config.sampler)[name] = value
    return config.sampler, config.diffusion


def sample(predict, x0, keys, **fields):
    sampler, process = configs(**fields)
    return build(sampler, diffusion.build(process), patch_size=2)(predict, x0, keys)


def coefficients(interpolant, t, xp=np):
    """alpha, sigma, alpha', sigma' from their definitions."""
    if interpolant == "linear":
        return t, 1 - t, 1.0, -1.0
    if interpolant == "gvp":
        c, s = xp.cos(xp.pi * t / 2), xp.sin(xp.pi * t / 2)
        return s, c, xp.pi / 2 * c, -xp.pi / 2 * s
    log_a = -0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)
    a, s = xp.exp(log_a), xp.sqrt(-xp.expm1(2 * log_a))
    d_a = a * (0.5 * (1 - t) * 19.9 + 0.05)
    return a, s, d_a, -a * d_a / s


def moments(interpolant, t):
    a, s, _, _ = coefficients(interpolant, np.float64(t))
    return a * MEAN, a**2 * STD**2 + s**2


def predictor(interpolant, prediction):
    """The best possible network: conditional expectations given x_t."""

    def predict(x, t):
        a, s, d_a, d_s = coefficients(interpolant, t.reshape(-1, 1, 1, 1), jnp)
        score = -(x - a * MEAN) / (a**2 * STD**2 + s**2)
        if prediction == "score":
            return score
        if prediction == "noise":
            return -s * score
        if prediction == "x":
            return MEAN + a * STD**2 * (x - a * MEAN) / (a**2 * STD**2 + s**2)
        return d_a * (MEAN - a * STD**2 * score) - d_s * s * score

    return predict


def transport(interpolant, x, t0, t1):
    """The exact ODE solution at t1 through x at t0: the affine map between the two marginals."""
    (mean0, variance0), (mean1, variance1) = moments(interpolant, t0), moments(interpolant, t1)
    return mean1 + np.sqrt(variance1 / variance0) * (np.asarray(x, np.float64) - mean0)


def shrunk_transport(interpolant, x, t0, t1):
    """As `transport`, of the velocity that predicted data gives: times min(1, sigma / .05)."""

    def velocity(t, x):
        a, s, d_a, d_s = coefficients(interpolant, t)
        score = -(x - a * MEAN) / (a**2 * STD**2 + s**2)
        return min(1, s / 0.05) * (d_a * (MEAN - a * STD**2 * score) - d_s * s * score)

    start = np.asarray(x, np.float64).ravel()
    return solve_ivp(velocity, (t0, t1), start, rtol=1e-8, atol=1e-8, max_step=0.005).y[:, -1].reshape(x.shape)


def ends(interpolant, prediction):
    if interpolant == "vp":
        return 0.0, 0.999
    return (0.0, 1.0) if prediction in ("velocity", "x") else (0.001, 0.999)


def noise_and_keys(batch, shape=(4, 4, 1)):
    return jax.random.normal(jax.random.key(5), (batch, *shape)), jax.random.split(jax.random.key(6), batch)


def bumpy(x, t):
    """A nonlinear velocity whose pixels interact."""
    t = t.reshape(-1, 1, 1, 1)
    return jnp.sin(3 * x + 5 * t) - x * jnp.mean(x**2, axis=(1, 2, 3), keepdims=True)


# ODE


@pytest.mark.parametrize("interpolant, prediction", itertools.product(INTERPOLANTS, PREDICTIONS))
def test_ode_is_the_exact_transport(interpolant, prediction):
    x0, keys = noise_and_keys(4)
    exact = shrunk_transport if prediction == "x" else transport
    expected = exact(interpolant, x0, *ends(interpolant, prediction))
    # Of a noise or score Heun's steps are too long at t = .001; of data dopri5 steps over the bend at sigma = .05.
    tolerances = {"velocity": {"heun": 1e-3, "dopri5": 1e-4}, "x": {"heun": 2e-4, "dopri5": 1e-3}}
    for method, tolerance in tolerances.get(prediction, {"dopri5": 1e-4}).items():
        fields = {"interpolant": interpolant, "prediction": prediction, "method": method, "num_steps": 200}
        x = sample(predictor(interpolant, prediction), x0, keys, **fields, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(x, expected, atol=tolerance)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_convergence_order(method, order):
    x0, keys = noise_and_keys(4)
    errors = []
    for num_steps in (16, 32, 64):
        x = sample(predictor("linear", "velocity"), x0, keys, method=method, num_steps=num_steps)
        errors.append(np.abs(x - transport("linear", x0, 0, 1)).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.2)


def test_dopri5_agrees_with_scipy_in_result_and_in_effort():
    x0, _ = noise_and_keys(3)
    run = jax.jit(lambda x, rtol: dopri5(bumpy, x, 0.0, 1.0, atol=1e-6, rtol=rtol))
    counts = []
    for rtol in (1e-3, 1e-5):
        x, evaluations = run(x0, rtol)
        counts.append(evaluations)
        for i in range(3):

            def velocity(t, flat):
                return np.sin(3 * flat + 5 * t) - flat * np.mean(flat**2)

            start = np.asarray(x0[i], np.float64).ravel()
            exact = solve_ivp(velocity, (0, 1), start, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
            same = solve_ivp(velocity, (0, 1), start, method="RK45", rtol=rtol, atol=1e-6)
            error, its_error = np.abs(x[i].ravel() - exact).max(), np.abs(same.y[:, -1] - exact).max()
            assert error < 2 * its_error + rtol
            assert 0.7 * same.nfev <= evaluations[i] <= 1.4 * same.nfev
    assert (counts[1] > 1.4 * counts[0]).all()


def test_dopri5_step_sizes_are_of_each_sample():
    """A neighbour whose first steps are rejected changes neither a sample's result nor its evaluations."""
    rates = jnp.array([2.0, 30.0, 200.0]).reshape(3, 1, 1, 1)

    @jax.jit
    def solve(rates):
        def velocity(x, t):
            # 0 at t = 0, so that the first step tried is the whole interval.
            return jnp.broadcast_to(rates * jnp.sin(rates * t.reshape(-1, 1, 1, 1)), x.shape)

        return dopri5(velocity, jnp.full((len(rates), 2, 2, 1), 2.0), 0.0, 1.0, atol=1e-6, rtol=1e-4)

    together, counts = solve(rates)
    np.testing.assert_allclose(together[:, 0, 0, 0], 3 - np.cos([2.0, 30.0, 200.0]), rtol=2e-3)
    assert counts[0] < counts[1] < counts[2]
    for i in (0, 1):
        alone, count = solve(rates[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=3e-6)
        assert count[0] == counts[i]


def test_dopri5_failure_is_nan_for_that_sample_alone():
    def explosive(x, t):
        # dx/dt = x^2 reaches infinity at t = 1 / x0: before 1 for the second sample.
        return x**2

    x0 = jnp.array([0.5, 2.0]).reshape(2, 1, 1, 1)
    x, evaluations = jax.jit(lambda x: dopri5(explosive, x, 0.0, 1.0, atol=1e-6, rtol=1e-4))(x0)
    np.testing.assert_allclose(x[0], 1.0, rtol=1e-3)
    assert np.isnan(x[1]).all()
    assert evaluations[1] <= 1 + 6 * 1000

    x, evaluations = dopri5(lambda x, t: x * jnp.nan, x0, 0.0, 1.0, atol=1e-6, rtol=1e-4)
    assert np.isnan(x).all() and (evaluations == 1).all()


def test_dopri5_of_a_network_that_is_still_zero():
    x0, keys = noise_and_keys(2)
    np.testing.assert_array_equal(sample(lambda x, t: jnp.zeros_like(x), x0, keys, method="dopri5"), x0)


def qwen_grid(num_steps, mu, terminal):
    """As diffusers' FlowMatchEulerDiscreteScheduler sets sigmas from those of its pipeline, in float64."""
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    sigmas = np.exp(mu) / (np.exp(mu) + (1 / sigmas - 1))
    if terminal:
        one_minus = 1 - sigmas
        sigmas = 1 - one_minus / (one_minus[-1] / (1 - terminal))
    return np.append(sigmas, 0.0)


SHIFTED = [  # fields, and known values of s = 1 - t at the ends of steps for 4096 tokens, by their places
    ({"num_steps": 4}, {0: 1, 1: 0.857192, 2: 0.666756, 3: 0.400096, 4: 0}),
    ({"num_steps": 4, "terminal_s": 0.02}, {0: 1, 1: 0.766709, 2: 0.455614, 3: 0.02, 4: 0}),
    ({"num_steps": 4, "shift": 3.0}, {0: 1, 1: 0.9, 2: 0.75, 3: 0.5, 4: 0}),
    ({"num_steps": 50, "terminal_s": 0.02}, {0: 1, 1: 0.989701, 2: 0.979192, 48: 0.058476, 49: 0.02, 50: 0}),
]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("fields, known", SHIFTED, ids=str)
def test_shifted_steps_are_those_of_qwen_image(fields, known, method):
    """Of 128 x 128 latents, 4096 tokens: the times of all network calls, and the lengths of all steps."""
    calls = []

    def clock(x, t):
        jax.debug.callback(calls.append, t[0], ordered=True)
        return jnp.broadcast_to(t.reshape(-1, 1, 1, 1), x.shape)

    x0, keys = jnp.zeros((1, 128, 128, 1)), noise_and_keys(1)[1]
    x = jax.jit(lambda x0: sample(clock, x0, keys, method=method, schedule="shifted", **fields))(x0)
    jax.effects_barrier()
    mu = np.log(fields["shift"]) if "shift" in fields else 0.693548
    s = qwen_grid(fields["num_steps"], mu, fields.get("terminal_s"))
    np.testing.assert_allclose([s[place] for place in known], list(known.values()), atol=1e-6)
    starts, ends = s[:-1], s[1:]
    np.testing.assert_allclose(calls if method == "euler" else calls[::2], 1 - starts, atol=1e-6)
    if method == "heun":
        np.testing.assert_allclose(calls[1::2], 1 - ends, atol=1e-6)
    slopes = 1 - starts if method == "euler" else 1 - (starts + ends) / 2
    np.testing.assert_allclose(x, np.sum((starts - ends) * slopes), atol=1e-6)


def test_shift_by_the_number_of_tokens():
    for num_tokens, mu in ((256, 0.5), (4096, 0.693548), (6889, 0.834325), (8192, 0.9)):
        assert abs(np.log(shift_of(num_tokens)) - mu) < 1e-6


# SDE


@pytest.mark.parametrize(
    "form, interpolant, method, prediction",
    [
        ("constant", "linear", "sde_heun", "score"),
        ("sbdm", "linear", "sde_euler", "velocity"),
        ("sbdm", "vp", "sde_heun", "noise"),
        ("sigma", "linear", "sde_euler", "velocity"),
        ("sigma", "gvp", "sde_heun", "noise"),
        ("linear", "vp", "sde_euler", "score"),
        ("decreasing", "linear", "sde_heun", "velocity"),
        ("increasing_decreasing", "gvp", "sde_euler", "velocity"),
    ],
)
def test_sde_has_the_marginal_of_the_data(form, interpolant, method, prediction):
    """Mean and variance of 16,384 pixels after 150 noisy steps; their standard errors are .004 and .003."""
    x0, keys = noise_and_keys(16, (32, 32, 1))
    x = sample(
        predictor(interpolant, prediction),
        x0,
        keys,
        interpolant=interpolant,
        prediction=prediction,
        method=method,
        num_steps=150,
        diffusion_form=form,
        last_step="none",
    )
    x = np.asarray(x, np.float64)
    mean, variance = moments(interpolant, 0.999)
    assert abs(x.mean() - mean) < 0.014
    assert abs(x.var() - variance) < 0.014


@pytest.mark.parametrize(
    "form, interpolant, method",
    [("sbdm", "linear", "sde_euler"), ("sigma", "gvp", "sde_heun"), ("constant", "vp", "sde_heun")],
)
def test_sde_of_predicted_data_has_the_marginal_of_the_conditional_mean(form, interpolant, method):
    """As above, at t = .94, where sigma > .05 and predicted data gives the true velocity; then the mean of x1."""
    x0, keys = noise_and_keys(16, (32, 32, 1))
    fields = {"interpolant": interpolant, "prediction": "x", "method": method, "num_steps": 150, "diffusion_form": form}
    x = sample(predictor(interpolant, "x"), x0, keys, **fields, last_step="tweedie", last_step_size=0.06)
    x = np.asarray(x, np.float64)
    a, s, _, _ = coefficients(interpolant, 0.94)
    assert abs(x.mean() - MEAN) < 0.014
    assert abs(x.var() - a**2 * STD**4 / (a**2 * STD**2 + s**2)) < 0.014


def test_zero_diffusion_is_the_ode():
    x0, keys = noise_and_keys(2)
    fields = {"method": "sde_euler", "num_steps": 20, "last_step_size": 0.05, "last_step": "euler"}
    x = sample(bumpy, x0, keys, **fields, diffusion_norm=0.0)
    np.testing.assert_allclose(x, sample(bumpy, x0, keys, method="euler", num_steps=20), atol=1e-6)


def test_tweedie_is_the_conditional_mean_of_the_data():
    x0, keys = noise_and_keys(4)
    size = 0.3
    common = {"method": "sde_euler", "num_steps": 2, "last_step_size": size, "diffusion_norm": 0.0}
    x = sample(predictor("linear", "velocity"), x0, keys, **common, last_step="tweedie")
    a, s = 1 - size, size
    x_t = np.asarray(x0, np.float64) + a * (MEAN - np.asarray(x0, np.float64))  # velocity at t = 0: MEAN - x
    gain = a * STD**2 / (a**2 * STD**2 + s**2)
    np.testing.assert_allclose(x, MEAN + gain * (x_t - a * MEAN), atol=1e-5)


def test_noise_of_a_sample_depends_on_its_key_alone():
    x0, keys = noise_and_keys(3)
    same = jnp.broadcast_to(x0[:1], x0.shape)
    x = sample(bumpy, same, keys, method="sde_euler", num_steps=5)
    assert np.abs(x[0] - x[1]).max() > 0.05
    x = sample(bumpy, same, keys[jnp.array([0, 1, 0])], method="sde_euler", num_steps=5)
    np.testing.assert_array_equal(x[0], x[2])


# Both


@pytest.mark.parametrize(
    "method, last_step",
    [*((method, "mean") for method in METHODS), ("sde_euler", "none"), ("sde_heun", "none")],
)
def test_number_of_network_calls(method, last_step):
    x0, keys = noise_and_keys(2)
    fields = {"method": method, "num_steps": 6, "last_step": last_step}
    sampler, _ = configs(**fields)
    calls = []

    def counted(x, t):
        jax.debug.callback(calls.append, t)
        return bumpy(x, t)

    jax.jit(lambda x0: sample(counted, x0, keys, **fields))(x0).block_until_ready()
    jax.effects_barrier()
    expected = {"euler": 6, "heun": 12, "sde_euler": 6, "sde_heun": 11 if last_step == "mean" else 12}.get(method)
    assert num_evaluations(sampler) == expected
    if method == "dopri5":
        _, evaluations = dopri5(bumpy, x0, 0.0, 1.0, atol=sampler.atol, rtol=sampler.rtol)
        expected = evaluations.max()
    assert len(calls) == expected
    assert np.min(calls) >= 0 and np.max(calls) <= 1


def test_published_evaluation_counts():
    assert num_evaluations(configs(method="heun", num_steps=125)[0]) == 250
    assert num_evaluations(configs(method="sde_euler", num_steps=250)[0]) == 250


@pytest.mark.parametrize("method", METHODS)
def test_sharded_and_guided_inside_jit_equals_each_sample_alone(method):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x0, keys = noise_and_keys(16)
    y = jnp.arange(16) % 3

    def predict(x, t, condition):
        return bumpy(x, t) * (1 + 0.2 * condition["label"].reshape(-1, 1, 1, 1))

    @jax.jit
    def run(x0, keys, y, scale):
        condition = {"label": y}
        network = guided(predict, condition, Labels(3).null(condition), scale=scale, interval=(0.2, 0.7))
        return sample(network, x0, keys, method=method, num_steps=4, interpolant="gvp")

    with jax.set_mesh(mesh):
        together = run(*jax.device_put((x0, keys, y), sharding), 1.8)
    assert together.sharding.is_equivalent_to(sharding, 4)
    assert together.dtype == jnp.float32 and np.isfinite(together).all()
    for i in (0, 7, 15):
        alone = run(x0[i : i + 1], keys[i : i + 1], y[i : i + 1], 1.8)[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "sde_euler", "sde_heun"])
def test_derivatives_through_the_steps(method):
    """Forward and reverse mode in a parameter of the network, against a difference."""
    x0, keys = noise_and_keys(2)

    def run(scale):
        return sample(lambda x, t: scale * bumpy(x, t), x0, keys, method=method, num_steps=6).sum()

    _, forward = jax.jvp(run, (jnp.float32(0.5),), (jnp.float32(1),))
    np.testing.assert_allclose(jax.grad(run)(jnp.float32(0.5)), forward, rtol=1e-5)
    difference = (run(jnp.float32(0.52)) - run(jnp.float32(0.48))) / 0.04
    np.testing.assert_allclose(forward, difference, rtol=2e-2)


def test_bfloat16_network():
    x0, keys = noise_and_keys(2)
    for method in ("dopri5", "sde_heun"):
        x = sample(lambda x, t: -x.astype(jnp.bfloat16), x0, keys, method=method, num_steps=3, rtol=0.1, atol=0.1)
        assert x.dtype == jnp.float32 and np.isfinite(x).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "sde_eulr"}, 'config.sampler.method = "sde_eulr".*"sde_euler"'),
        ({"method": "sde_euler", "diffusion_form": "sigmas"}, '"sigma"'),
        ({"method": "sde_euler", "last_step": "men"}, '"mean"'),
        ({"method": "sde_euler", "num_steps": 1}, "num_steps = 1 must be at least 2"),
        ({"method": "sde_heun", "last_step_size": 0.0}, "last_step_size = 0.0"),
        ({"method": "sde_heun", "last_step_size": 1.0}, "last_step_size = 1.0"),
        ({"method": "sde_heun", "last_step_size": float("nan")}, "last_step_size = nan"),
        ({"cfg_interval": (0.8, 0.2)}, r"cfg_interval = \(0.8, 0.2\)"),
        ({"cfg_interval": (0.2, float("nan"))}, "cfg_interval"),
        ({"cfg_interval": (0.5,)}, "cfg_interval"),
        ({"schedule": "shiftd"}, 'config.sampler.schedule = "shiftd".*"shifted"'),
        ({"schedule": "shifted", "method": "sde_euler"}, 'euler and heun, not "sde_euler"'),
        ({"schedule": "shifted", "method": "dopri5"}, 'euler and heun, not "dopri5"'),
        ({"schedule": "shifted", "num_steps": 1, "terminal_s": 0.02}, "num_steps = 1 must be at least 2"),
    ],
)
def test_what_cannot_work_is_a_user_error_of_one_line(fields, message):
    x0, keys = noise_and_keys(1)
    with pytest.raises(UserError, match=message) as error:
        sample(bumpy, x0, keys, **fields)
    assert "\n" not in str(error.value)
