"""Every fixed-step sampler against a float64 NumPy statement of SiT's formulae, fed with the same noise.

A network that predicts data is read as its paper does (arXiv 2511.13720).

The slow form covers every combination of interpolant, prediction, method, diffusion form and last step, so it
also shows that none of them gives NaN; the quick one has every form and last step with each of the others.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import diffusion
from dar_jax.config import default
from dar_jax.diffusion.sampler import DIFFUSION_FORMS, LAST_STEPS, build

NORM, LAST_STEP_SIZE, NUM_STEPS, SHAPE = 0.7, 0.06, 4, (2, 2, 3, 2)


def network(x, t, xp):
    return 0.3 * xp.sin(2 * x) + 0.2 * x - t


class Path:
    """Path quantities the official way: from the ratio alpha'/alpha and the SBDM diffusion."""

    def __init__(self, name, t):
        if name == "linear":
            self.a, self.s, self.ds, self.ratio = t, 1 - t, -1.0, 1 / t if t else np.inf
            self.da = 1.0
        elif name == "gvp":
            self.a, self.s = np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
            self.da, self.ds = np.pi / 2 * self.s, -np.pi / 2 * self.a
            self.ratio = np.pi / (2 * np.tan(np.pi * t / 2)) if t else np.inf
        else:
            log_a = -0.25 * (1 - t) ** 2 * (20 - 0.1) - 0.5 * (1 - t) * 0.1
            self.ratio = 0.5 * (1 - t) * (20 - 0.1) + 0.5 * 0.1
            self.a = np.exp(log_a)
            self.s = np.sqrt(1 - self.a**2)
            self.da, self.ds = self.a * self.ratio, -(self.a**2) * self.ratio / self.s
        self.sbdm = self.ratio * self.s**2 - self.s * self.ds if self.a else np.inf

    def score(self, m, x, prediction):
        if prediction == "score":
            return m
        if prediction == "noise":
            return -m / self.s
        if prediction == "x":
            return (self.a * m - x) / self.s**2
        inverse = self.a / self.da
        return (inverse * m - x) / (self.s**2 - inverse * self.ds * self.s)

    def velocity(self, m, x, prediction):
        if prediction == "velocity":
            return m
        if prediction == "x":
            if self.da == 1:
                return (m - x) / np.maximum(1 - self.a, 0.05)
            return (self.da * self.s * m + self.ds * (x - self.a * m)) / np.maximum(self.s, 0.05)
        return self.ratio * x + self.sbdm * self.score(m, x, prediction)

    def diffusion(self, form, t):
        return {
            "constant": NORM,
            "sbdm": NORM * self.sbdm,
            "sigma": NORM * self.s,
            "linear": NORM * (1 - t),
            "decreasing": 0.25 * (NORM * np.cos(np.pi * t) + 1) ** 2,
            "increasing_decreasing": NORM * np.sin(np.pi * t) ** 2,
        }[form]


def reference_sample(x, noise, interpolant, prediction, method, form, last):
    singular = interpolant != "vp" and prediction in ("score", "noise")

    def velocity(x, t):
        return Path(interpolant, t).velocity(network(x, t, np), x, prediction)

    def drift(x, t):
        path, m = Path(interpolant, t), network(x, t, np)
        return path.velocity(m, x, prediction) + path.diffusion(form, t) * path.score(m, x, prediction)

    if not method.startswith("sde"):
        ends = (0.001, 0.999) if singular else (0.0, 0.999 if interpolant == "vp" else 1.0)
        times = np.linspace(*ends, NUM_STEPS + 1)
        for t, t_next in itertools.pairwise(times):
            k1 = velocity(x, t)
            k2 = velocity(x + (t_next - t) * k1, t_next) if method == "heun" else k1
            x = x + (t_next - t) * (k1 + k2) / 2
        return x

    start = 0.001 if singular or (form == "sbdm" and interpolant != "vp") else 0.0
    end = 0.999 if last == "none" else 1 - LAST_STEP_SIZE
    times = np.linspace(start, end, NUM_STEPS + 1 if last == "none" else NUM_STEPS)
    for (t, t_next), w in zip(itertools.pairwise(times), noise, strict=False):
        h = t_next - t
        dw = np.sqrt(2 * Path(interpolant, t).diffusion(form, t) * h) * w
        if method == "sde_euler":
            x = x + h * drift(x, t) + dw
        else:
            k1 = drift(x + dw, t)
            k2 = drift(x + dw + h * k1, t_next)
            x = x + dw + h * (k1 + k2) / 2
    if last == "mean":
        return x + LAST_STEP_SIZE * drift(x, end)
    if last == "euler":
        return x + LAST_STEP_SIZE * velocity(x, end)
    if last == "tweedie":
        path = Path(interpolant, end)
        return x / path.a + path.s**2 / path.a * path.score(network(x, end, np), x, prediction)
    return x


SDE_CHOICES = list(itertools.product(("sde_euler", "sde_heun"), DIFFUSION_FORMS, LAST_STEPS))


def python_scan(step, carry, xs):
    for index in range(len(xs[0])):
        carry, _ = step(carry, tuple(x[index] for x in xs))
    return carry, None


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "x"])
@pytest.mark.parametrize("sde_choices", [SDE_CHOICES[::5], pytest.param(SDE_CHOICES, marks=pytest.mark.slow)])
def test_samplers_equal_the_formulae(interpolant, prediction, sde_choices, monkeypatch):
    # Compiling a loop for each of the 600 combinations would take minutes.
    monkeypatch.setattr(jax.lax, "scan", python_scan)
    x0 = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), SHAPE[0])
    noise = [
        np.stack([jax.random.normal(jax.random.fold_in(key, k), SHAPE[1:]) for key in keys]) for k in range(NUM_STEPS)
    ]
    for method, form, last in [("euler", "sigma", "none"), ("heun", "sigma", "none"), *sde_choices]:
        config = default()
        config.diffusion.update(interpolant=interpolant, prediction=prediction)
        config.sampler.update(method=method, num_steps=NUM_STEPS, diffusion_form=form, diffusion_norm=NORM)
        config.sampler.update(last_step=last, last_step_size=LAST_STEP_SIZE)
        sample = build(config.sampler, diffusion.build(config.diffusion), patch_size=2)
        output = sample(lambda x, t: network(x, t.reshape(-1, 1, 1, 1), jnp), x0, keys)
        expected = reference_sample(x0.astype(np.float64), noise, interpolant, prediction, method, form, last)
        assert np.isfinite(expected).all()
        # sin(2 x) of the large values of unstable combinations amplifies float32 rounding.
        error = np.abs(output - expected).max() / np.abs(expected).max()
        assert error < 2e-4, f"{method}, {form}, {last}: {error}"
