"""Interpolants x_t = alpha_t x1 + sigma_t x0 from noise, t = 0, to data, t = 1; after SiT (arXiv 2401.08740).

The velocity is alpha'_t x1 + sigma'_t x0. With x_t it makes two linear equations for (x1, x0). Their
determinant W = alpha' sigma - alpha sigma' is positive: 1 (linear), pi/2 (GVP), alpha'/sigma (VP). Every
conversion below solves that system. Written so, the only divisors are W, alpha (zero at t = 0) and sigma
(zero at t = 1), never alpha', which vanishes for GVP at t = 1; `time_range` keeps t where the divisors a
prediction needs are positive.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dar_jax.errors import check_choice

Array = jax.Array

PREDICTIONS = ("velocity", "score", "noise")
TIME_MARGIN = 1e-3  # distance kept from a singular end of [0, 1]


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """The coefficients of a path and their derivatives in t, each elementwise in t (any shape)."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    d_alpha: Callable[[Array], Array]
    d_sigma: Callable[[Array], Array]

    def determinant(self, t: Array) -> Array:
        """W = alpha' sigma - alpha sigma'."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)


def _gvp_alpha(t: Array) -> Array:
    return jnp.sin(jnp.pi / 2 * t)


def _gvp_sigma(t: Array) -> Array:
    # cos(pi t / 2), in the form that is exactly 0 at t = 1.
    return jnp.sin(jnp.pi / 2 * (1 - t))


_BETA_MIN, _BETA_MAX = 0.1, 20.0


def _vp_log_alpha(t: Array) -> Array:
    return -0.25 * (1 - t) ** 2 * (_BETA_MAX - _BETA_MIN) - 0.5 * (1 - t) * _BETA_MIN


def _vp_alpha(t: Array) -> Array:
    return jnp.exp(_vp_log_alpha(t))


def _vp_sigma(t: Array) -> Array:
    # sqrt(1 - alpha^2) without its cancellation near t = 1.
    return jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t)))


def _vp_d_alpha(t: Array) -> Array:
    return _vp_alpha(t) * 0.5 * ((1 - t) * (_BETA_MAX - _BETA_MIN) + _BETA_MIN)


_INTERPOLANTS = {
    "linear": Interpolant(
        alpha=lambda t: t, sigma=lambda t: 1 - t, d_alpha=jnp.ones_like, d_sigma=lambda t: -jnp.ones_like(t)
    ),
    "gvp": Interpolant(
        alpha=_gvp_alpha,
        sigma=_gvp_sigma,
        d_alpha=lambda t: jnp.pi / 2 * _gvp_sigma(t),
        d_sigma=lambda t: -jnp.pi / 2 * _gvp_alpha(t),
    ),
    "vp": Interpolant(
        alpha=_vp_alpha,
        sigma=_vp_sigma,
        d_alpha=_vp_d_alpha,
        d_sigma=lambda t: -_vp_alpha(t) * _vp_d_alpha(t) / _vp_sigma(t),
    ),
}


def get_interpolant(name: str) -> Interpolant:
    """Returns linear (t, 1 - t), gvp (sin, cos of pi t / 2) or vp (variance preserving, beta .1 to 20).

    Raises UserError for another name.
    """
    check_choice("config.diffusion.interpolant", name, _INTERPOLANTS)
    return _INTERPOLANTS[name]


def time_range(interpolant_name: str, prediction: str, *, sampling: bool) -> tuple[float, float]:
    """Returns the ends (t0, t1) between which t is drawn in training or integrated by an ODE in sampling.

    VP has sigma' infinite at t = 1. On the other paths the velocity alone is finite at both ends: a noise or
    score prediction gives no velocity at t = 0 (alpha = 0), and the score is unbounded at t = 1.

    Raises UserError for an unknown name.
    """
    get_interpolant(interpolant_name)
    check_choice("config.diffusion.prediction", prediction, PREDICTIONS)
    if interpolant_name == "vp":
        return 0.0, 1.0 - (TIME_MARGIN if sampling else 1e-5)
    if prediction == "velocity":
        return 0.0, 1.0
    return TIME_MARGIN, 1.0 - TIME_MARGIN


def expand(t: Array, x: Array) -> Array:
    """Returns t [B] as [B, 1, ...] with the rank of x."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def to_noise(output: Array, x_t: Array, t: Array, interpolant: Interpolant, prediction: str) -> Array:
    """Returns the noise x0 that a network output stands for; finite wherever W is, with no other divisor.

    output, x_t: [B, ...] float32; t: [B] float32; prediction: what the output is, velocity | score | noise.
    """
    if prediction == "noise":
        return output
    t = expand(t, x_t)
    if prediction == "score":
        return -interpolant.sigma(t) * output
    return (interpolant.d_alpha(t) * x_t - interpolant.alpha(t) * output) / interpolant.determinant(t)


def to_velocity(output: Array, x_t: Array, t: Array, interpolant: Interpolant, prediction: str) -> Array:
    """Returns the velocity that a network output stands for; from a noise or score it needs alpha_t > 0.

    Arguments as for `to_noise`.
    """
    if prediction == "velocity":
        return output
    noise = to_noise(output, x_t, t, interpolant, prediction)
    t = expand(t, x_t)
    return (interpolant.d_alpha(t) * x_t - interpolant.determinant(t) * noise) / interpolant.alpha(t)


def to_score(output: Array, x_t: Array, t: Array, interpolant: Interpolant, prediction: str) -> Array:
    """Returns the score, the gradient of log p_t(x_t), that a network output stands for; needs sigma_t > 0.

    It is -E[x0 | x_t] / sigma_t. Arguments as for `to_noise`.
    """
    if prediction == "score":
        return output
    return -to_noise(output, x_t, t, interpolant, prediction) / interpolant.sigma(expand(t, x_t))
