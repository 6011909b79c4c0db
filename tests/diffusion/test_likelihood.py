"""Likelihoods against a Gaussian in closed form, and the divergence against exact traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dar_jax.diffusion.likelihood import log_likelihood
from dar_jax.diffusion.path import PATHS, expand


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_a_gaussian_has_its_density(interpolant):
    """Data N(mean, spread^2): E[x1 | x_t] and E[x0 | x_t] in closed form give the velocity. Its Jacobian is diagonal,
    so that one probe of signs gives its trace exactly."""
    path, mean = PATHS[interpolant], jnp.array([0.5, -1.0, 0.2])
    spread = jnp.array([0.3, 1.0, 2.0])

    def velocity(x, t):
        t = expand(t, x)
        a, s = path.alpha(t), path.sigma(t)
        variance = a**2 * spread**2 + s**2
        data = mean + a * spread**2 / variance * (x - a * mean)
        noise = s / variance * (x - a * mean)
        return path.d_alpha(t) * data + path.d_sigma(t) * noise

    with jax.enable_x64(True):
        x1 = mean + spread * jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
        probe = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], size=(6, 3)))
        found = log_likelihood(velocity, path, x1, probe, times=(0.0, 1.0), num_steps=400)
        wanted = stats.norm.logpdf(x1, mean, spread).sum(1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_probes_of_all_directions_give_the_exact_trace():
    """The way does not depend on the probe, so the parts of unit vectors add up to the integral of the trace."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        w1, w2 = jnp.asarray(rng.normal(size=(4, 8))), jnp.asarray(0.5 * rng.normal(size=(8, 4)))
        x1, steps, path = jnp.asarray(rng.normal(size=(1, 4))), 5, PATHS["linear"]

        def velocity(x, t):
            return jnp.tanh(x @ w1 + t[:, None]) @ w2

        def with_probe(probe):
            return log_likelihood(velocity, path, x1, probe, times=(0.0, 1.0), num_steps=steps)[0]

        without = with_probe(jnp.zeros((1, 4)))
        integral = sum(without - with_probe(jnp.eye(4)[i : i + 1]) for i in range(4))

        def at(x, t):
            field = lambda y: velocity(y[None], jnp.full(1, t))[0]  # noqa: E731
            return field(x), jnp.trace(jax.jacfwd(field)(x))

        x, wanted, size = x1[0], 0.0, 1 / steps
        for i in range(steps):
            t = 1 - i * size
            v, trace = at(x, t)
            v_next, trace_next = at(x - size * v, t - size)
            x, wanted = x - 0.5 * size * (v + v_next), wanted + 0.5 * size * (trace + trace_next)
        np.testing.assert_allclose(integral, wanted, rtol=1e-10)
        np.testing.assert_allclose(without, stats.norm.logpdf(x).sum(), rtol=1e-10)
