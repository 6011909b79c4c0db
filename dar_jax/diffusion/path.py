"""Paths x_t = alpha_t x1 + sigma_t x0 from noise, t = 0, to data, t = 1; after SiT (arXiv 2401.08740).

The velocity is alpha'_t x1 + sigma'_t x0. With x_t it makes two linear equations for (x1, x0). Their
determinant W = alpha' sigma - alpha sigma' is positive: 1 (linear), pi/2 (GVP), alpha'/sigma (VP).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

TIME_MARGIN = 1e-3  # distance kept from a singular end of [0, 1]


def expand(t: Array, x: Array) -> Array:
    """Returns t [B] as [B, 1, ...] with the rank of x."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Path:
    """The coefficients of a path and their derivatives in t, each elementwise in t (any shape).

    Attributes:
      alpha, sigma, d_alpha, d_sigma: alpha_t, sigma_t, alpha'_t, sigma'_t.
      starts_as_noise: whether alpha_0 = 0, so that nothing may be divided by alpha at t = 0.
      ends_steeply: whether sigma' is infinite at t = 1.
    """

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    d_alpha: Callable[[Array], Array]
    d_sigma: Callable[[Array], Array]
    starts_as_noise: bool = True
    ends_steeply: bool = False

    def determinant(self, t: Array) -> Array:
        """W = alpha' sigma - alpha sigma'."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def interpolate(self, x1: Array, x0: Array, t: Array) -> Array:
        """x_t = alpha_t x1 + sigma_t x0 of data and noise [B, ...] at times t [B]."""
        t = expand(t, x1)
        return self.alpha(t) * x1 + self.sigma(t) * x0

    def velocity(self, x1: Array, x0: Array, t: Array) -> Array:
        """alpha'_t x1 + sigma'_t x0 of data and noise [B, ...] at times t [B]."""
        t = expand(t, x1)
        return self.d_alpha(t) * x1 + self.d_sigma(t) * x0


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


# Linear, GVP (sin and cos of pi t / 2) and VP (variance preserving, beta from .1 to 20).
PATHS = {
    "linear": Path(
        alpha=lambda t: t, sigma=lambda t: 1 - t, d_alpha=jnp.ones_like, d_sigma=lambda t: -jnp.ones_like(t)
    ),
    "gvp": Path(
        alpha=_gvp_alpha,
        sigma=_gvp_sigma,
        d_alpha=lambda t: jnp.pi / 2 * _gvp_sigma(t),
        d_sigma=lambda t: -jnp.pi / 2 * _gvp_alpha(t),
    ),
    "vp": Path(
        alpha=_vp_alpha,
        sigma=_vp_sigma,
        d_alpha=_vp_d_alpha,
        d_sigma=lambda t: -_vp_alpha(t) * _vp_d_alpha(t) / _vp_sigma(t),
        starts_as_noise=False,
        ends_steeply=True,
    ),
}
