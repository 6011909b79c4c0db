"""The training objective: draw noise and time, compare the network's output with what it should predict."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dar_jax.diffusion.interpolant import Interpolant, expand, get_interpolant, time_range
from dar_jax.errors import UserError, check_choice

Array = jax.Array


def draw(key: Array, x1: Array, diffusion: ConfigDict) -> tuple[Array, Array]:
    """Draws the times and noises of a batch, apart from the loss so that microbatches can share one draw.

    Args:
      key: a typed PRNG key.
      x1: data [B, ...]; only its shape is used.
      diffusion: config.diffusion.

    Returns:
      t [B] float32, in the training range of `time_range`: uniform, or logit_normal, that is
      sigmoid(time_mean + time_std * N(0, 1)) stretched linearly over the range (arXiv 2403.03206);
      x0 float32 of the shape of x1, N(0, 1).

    Raises:
      UserError: diffusion.time is unknown or time_std is not positive.
    """
    check_choice("config.diffusion.time", diffusion.time, ("uniform", "logit_normal"))
    t0, t1 = time_range(diffusion.interpolant, diffusion.prediction, sampling=False)
    time_key, noise_key = jax.random.split(key)
    batch = x1.shape[:1]
    if diffusion.time == "uniform":
        unit = jax.random.uniform(time_key, batch, jnp.float32)
    else:
        if diffusion.time_std <= 0:
            raise UserError(f"config.diffusion.time_std = {diffusion.time_std} must be positive.")
        normal = jax.random.normal(time_key, batch, jnp.float32)
        unit = jax.nn.sigmoid(diffusion.time_mean + diffusion.time_std * normal)
    return t0 + (t1 - t0) * unit, jax.random.normal(noise_key, x1.shape, jnp.float32)


def _weight(weighting: str, interpolant: Interpolant, t: Array) -> Array:
    """Weight of the squared noise error: 1, (D / sigma)^2 or D / sigma^2, where D = sigma W / alpha."""
    check_choice("config.diffusion.weighting", weighting, ("none", "velocity", "likelihood"))
    if weighting == "none":
        return jnp.ones_like(t)
    ratio = interpolant.determinant(t) / interpolant.alpha(t)
    return ratio**2 if weighting == "velocity" else ratio / interpolant.sigma(t)


def loss_per_example(
    predict: Callable[[Array, Array], Array], x1: Array, x0: Array, t: Array, diffusion: ConfigDict
) -> Array:
    """Squared error of one network call at x_t = alpha_t x1 + sigma_t x0, averaged over each example.

    velocity: |output - (alpha' x1 + sigma' x0)|^2, unweighted; noise: w |output - x0|^2;
    score: w |sigma output + x0|^2, with w as config.diffusion.weighting says.

    Args:
      predict: (x_t [B, H, W, C] float32, t [B] float32) -> output [B, H, W, C].
      x1, x0: data and noise [B, H, W, C]; t: [B] float32 within the training range.
      diffusion: config.diffusion.

    Returns:
      [B] float32.

    Raises:
      UserError: an unknown name in `diffusion`.
      ValueError: the output has not the shape of x1.
    """
    interpolant = get_interpolant(diffusion.interpolant)
    time_range(diffusion.interpolant, diffusion.prediction, sampling=False)
    x1, x0 = x1.astype(jnp.float32), x0.astype(jnp.float32)
    t_ = expand(t, x1)  # [B, 1, 1, 1]
    alpha_t, sigma_t = interpolant.alpha(t_), interpolant.sigma(t_)

    output = predict(alpha_t * x1 + sigma_t * x0, t)
    if output.shape != x1.shape:
        raise ValueError(f"the network returned {output.shape} for data of shape {x1.shape}; they must be equal.")
    output = output.astype(jnp.float32)

    axes = tuple(range(1, x1.ndim))
    if diffusion.prediction == "velocity":
        velocity = interpolant.d_alpha(t_) * x1 + interpolant.d_sigma(t_) * x0
        return jnp.mean((output - velocity) ** 2, axis=axes)
    error = output - x0 if diffusion.prediction == "noise" else sigma_t * output + x0
    return _weight(diffusion.weighting, interpolant, t) * jnp.mean(error**2, axis=axes)
