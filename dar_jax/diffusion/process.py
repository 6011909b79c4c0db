"""The diffusion process of a config: its path, what the network predicts, the times of training and the loss."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dar_jax.diffusion.path import PATHS, Path
from dar_jax.diffusion.prediction import PREDICTIONS, Prediction
from dar_jax.diffusion.schedule import shift_time
from dar_jax.errors import check_choice

Array = jax.Array


def _uniform(section: ConfigDict) -> Callable[[Array, tuple], Array]:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32)


def _logit_normal(section: ConfigDict) -> Callable[[Array, tuple], Array]:
    """sigmoid(time_mean + time_std * N(0, 1)), arXiv 2403.03206."""
    mean, std = section.time_mean, section.time_std
    return lambda key, shape: jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))


def _shifted(section: ConfigDict) -> Callable[[Array, tuple], Array]:
    """1 - shift_time(u, time_shift) of uniform u: the times at which a shifted schedule samples, arXiv 2403.03206."""
    return lambda key, shape: 1 - shift_time(jax.random.uniform(key, shape, jnp.float32), section.time_shift)


# A config section -> the function (key, shape) that draws times from [0, 1].
TIMES = {"uniform": _uniform, "logit_normal": _logit_normal, "shifted": _shifted}

# (path, t) -> the weight of the squared noise error: 1, (D / sigma)^2 or D / sigma^2, where D = sigma W / alpha.
WEIGHTINGS = {
    "none": lambda path, t: jnp.ones_like(t),
    "velocity": lambda path, t: (path.determinant(t) / path.alpha(t)) ** 2,
    "likelihood": lambda path, t: path.determinant(t) / path.alpha(t) / path.sigma(t),
}


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A diffusion process, made by `build`.

    `predict` is the network everywhere, (x_t [B, H, W, C] float32, t [B] float32) -> output [B, H, W, C].

    Attributes:
      path: of x_t from noise to data.
      prediction: what the network's output is; it converts an output to velocity, noise and score.
      draw_unit_time: (key, shape) -> float32 in [0, 1].
      weight: (path, t [B]) -> [B], the weight of the squared noise error.
    """

    path: Path
    prediction: Prediction
    draw_unit_time: Callable[[Array, tuple], Array]
    weight: Callable[[Path, Array], Array]

    def draw(self, key: Array, x1: Array) -> tuple[Array, Array]:
        """Draws the times and noises of a batch, apart from the loss so that microbatches can share one draw.

        Args:
          key: a typed PRNG key.
          x1: data [B, ...]; only its shape is used.

        Returns:
          t [B] float32: times of the config's distribution, stretched linearly over the training range of
          `Prediction.time_range`; x0 float32 of the shape of x1, N(0, 1).
        """
        t0, t1 = self.prediction.time_range(sampling=False)
        time_key, noise_key = jax.random.split(key)
        unit = self.draw_unit_time(time_key, x1.shape[:1])
        return t0 + (t1 - t0) * unit, jax.random.normal(noise_key, x1.shape, jnp.float32)

    def loss(self, predict: Callable[[Array, Array], Array], x1: Array, x0: Array, t: Array) -> Array:
        """Squared error of one network call at x_t, averaged over each example: what training minimises.

        It is w |x0 of the output - x0|^2 of a noise or score, with w as config.diffusion.weighting says. Of a velocity
        or data it is `velocity_loss`, without a weight.

        Args:
          predict: the network.
          x1, x0: data and noise [B, H, W, C].
          t: [B] float32 within the training range.

        Returns:
          [B] float32.

        Raises:
          ValueError: the output has not the shape of x1.
        """
        if not self.prediction.compares_noise:
            return self.velocity_loss(predict, x1, x0, t)
        x_t = self.path.interpolate(x1, x0, t)
        error = self.prediction.noise(_call(predict, x_t, t), x_t, t) - x0
        return self.weight(self.path, t) * _mean_square(error)

    def velocity_loss(self, predict: Callable[[Array, Array], Array], x1: Array, x0: Array, t: Array) -> Array:
        """|velocity of the output - velocity of the pair|^2, averaged over each example, whatever is predicted.

        The velocity of the pair is `Prediction.target`: alpha' x1 + sigma' x0, or less near t = 1 of `prediction.Data`.
        Arguments, result and errors are those of `loss`. t is within the sampling range.
        """
        x_t = self.path.interpolate(x1, x0, t)
        velocity = self.prediction.velocity(_call(predict, x_t, t), x_t, t)
        return _mean_square(velocity - self.prediction.target(x1, x0, x_t, t))


def _call(predict: Callable[[Array, Array], Array], x_t: Array, t: Array) -> Array:
    output = predict(x_t, t)
    if output.shape != x_t.shape:
        raise ValueError(f"the network returned {output.shape} for data of shape {x_t.shape}; they must be equal.")
    return output.astype(jnp.promote_types(output.dtype, jnp.float32))


def _mean_square(error: Array) -> Array:
    """[B, ...] -> [B]."""
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def check(section: ConfigDict) -> None:
    """Raises UserError for the first field of config.diffusion that cannot work."""
    check_choice("config.diffusion.interpolant", section.interpolant, PATHS)
    check_choice("config.diffusion.prediction", section.prediction, PREDICTIONS)
    check_choice("config.diffusion.weighting", section.weighting, WEIGHTINGS)
    check_choice("config.diffusion.time", section.time, TIMES)


def build(section: ConfigDict) -> Diffusion:
    """The process of config.diffusion. Raises UserError if `check` does."""
    check(section)
    path = PATHS[section.interpolant]
    return Diffusion(
        path, PREDICTIONS[section.prediction](path), TIMES[section.time](section), WEIGHTINGS[section.weighting]
    )
