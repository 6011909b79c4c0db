"""The likelihood of data under the probability-flow ODE (score-based SDEs, arXiv 2011.13456, Eq. 39 and 40).

dx = v dt carries noise at t0 to data at t1, so log p(x1) = log p(x0) - the integral of div v along the way. The
divergence is estimated by Hutchinson's e . (J^T e) with one vector e per sample, which stays the same on the way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.diffusion.path import Path


def log_likelihood(
    velocity: Callable[[Array, Array], Array],
    path: Path,
    x1: Array,
    probe: Array,
    *,
    times: tuple[float, float],
    num_steps: int,
) -> Array:
    """log p(x1) in nats, `[B]` float32, by `num_steps` steps of Heun's method from data to noise.

    Args:
      velocity: (x_t [B, ...], t [B]) -> v [B, ...].
      path: of the noising.
      x1: data `[B, ...]`.
      probe: e, of the shape of x1, whose values have mean 0 and variance 1.
      times: t0 near the noise and t1 near the data.
      num_steps: of two evaluations each, forward and backward.
    """
    t0, t1 = times
    size = (t1 - t0) / num_steps

    def slopes(x: Array, t: Array) -> tuple[Array, Array]:
        v, vjp = jax.vjp(lambda x: velocity(x, jnp.full(x.shape[:1], t, x.dtype)), x)
        return v, _inner(vjp(probe)[0], probe)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, integral = carry
        t = t1 - i * size
        v, divergence = slopes(x, t)
        v_next, divergence_next = slopes(x - size * v, t - size)
        return x - 0.5 * size * (v + v_next), integral + 0.5 * size * (divergence + divergence_next)

    x0, integral = jax.lax.fori_loop(0, num_steps, step, (x1, jnp.zeros(x1.shape[:1], x1.dtype)))
    scale = path.sigma(jnp.asarray(t0, x1.dtype))
    dimensions = x1[0].size
    log_prior = -0.5 * _inner(x0, x0) / scale**2 - dimensions * (0.5 * jnp.log(2 * jnp.pi) + jnp.log(scale))
    return log_prior - integral


def _inner(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))
