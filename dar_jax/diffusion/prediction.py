"""What a network predicts, and how the other quantities follow from it.

Each class solves the two linear equations of `path` for what the network does not give. Written with their determinant
W, the only divisors are W, alpha (zero at t = 0) and sigma (zero at t = 1), never alpha', which vanishes for GVP at
t = 1. `time_range` keeps t where the divisors that a prediction needs are positive.

A new prediction is a subclass of `Prediction` and an entry of `PREDICTIONS`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dar_jax.diffusion.path import TIME_MARGIN, Path, expand

Array = jax.Array

SIGMA_MIN = 0.05  # the least divisor of the velocity of predicted data


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One kind of network output on one path.

    All methods take an output of the network and x_t, [B, ...] float32, and t [B] float32 in the range of time.

    Attributes:
      path: the path.
      margin: distance from the ends of [0, 1] at which the velocity and the loss are finite.
      compares_noise: whether the loss is the weighted error of the noise. It is the error of the velocity otherwise.
    """

    path: Path
    margin: ClassVar[float] = TIME_MARGIN
    compares_noise: ClassVar[bool] = True

    def noise(self, output: Array, x_t: Array, t: Array) -> Array:
        """The noise x0 that an output stands for."""
        raise NotImplementedError

    def velocity(self, output: Array, x_t: Array, t: Array) -> Array:
        """The velocity that an output stands for, (alpha' x_t - W x0) / alpha. It needs alpha_t > 0."""
        noise = self.noise(output, x_t, t)
        t = expand(t, x_t)
        return (self.path.d_alpha(t) * x_t - self.path.determinant(t) * noise) / self.path.alpha(t)

    def score(self, output: Array, x_t: Array, t: Array) -> Array:
        """The score, the gradient of log p_t(x_t), that an output stands for: -x0 / sigma. It needs sigma_t > 0."""
        return -self.noise(output, x_t, t) / self.path.sigma(expand(t, x_t))

    def data(self, output: Array, x_t: Array, t: Array) -> Array:
        """The data x1 that an output stands for, (sigma v - sigma' x_t) / W."""
        velocity = self.velocity(output, x_t, t)
        t = expand(t, x_t)
        return (self.path.sigma(t) * velocity - self.path.d_sigma(t) * x_t) / self.path.determinant(t)

    def target(self, x1: Array, x0: Array, x_t: Array, t: Array) -> Array:
        """The velocity that `velocity` of the network's output is compared with, for data x1 and noise x0."""
        return self.path.velocity(x1, x0, t)

    def time_range(self, *, sampling: bool) -> tuple[float, float]:
        """The ends (t0, t1) between which t is drawn in training or integrated by an ODE in sampling."""
        t0 = self.margin if self.path.starts_as_noise else 0.0
        if self.path.ends_steeply:
            return t0, 1.0 - (TIME_MARGIN if sampling else 1e-5)
        return t0, 1.0 - self.margin


class Velocity(Prediction):
    """alpha' x1 + sigma' x0."""

    margin = 0.0
    compares_noise = False

    def noise(self, output, x_t, t):
        t = expand(t, x_t)
        return (self.path.d_alpha(t) * x_t - self.path.alpha(t) * output) / self.path.determinant(t)

    def velocity(self, output, x_t, t):
        return output


class Score(Prediction):
    """The gradient of log p_t(x_t)."""

    def noise(self, output, x_t, t):
        return -self.path.sigma(expand(t, x_t)) * output

    def score(self, output, x_t, t):
        return output


class Noise(Prediction):
    """x0."""

    def noise(self, output, x_t, t):
        return output


class Data(Prediction):
    """x1, compared as velocity ("Back to Basics", arXiv 2511.13720).

    The velocity is (W x1 + sigma' x_t) / sigma with the divisor sigma held at SIGMA_MIN at least, in sampling and in
    both sides of the loss. On the linear path that is the paper's (x1 - x_t) / max(1 - t, .05), and the loss is
    |W (output - x1) / max(sigma, .05)|^2 on all paths. Where sigma < .05 this velocity is sigma / .05 times the true
    one, so an exact ODE on the linear path leaves noise of standard deviation .05 / e = .018 in its samples. Noise and
    score are those of the equations, without the bound: an SDE ends where sigma_t > 0.
    """

    margin = 0.0
    compares_noise = False

    def noise(self, output, x_t, t):
        t = expand(t, x_t)
        return (x_t - self.path.alpha(t) * output) / self.path.sigma(t)

    def velocity(self, output, x_t, t):
        t = expand(t, x_t)
        sigma = jnp.maximum(self.path.sigma(t), SIGMA_MIN)
        return (self.path.determinant(t) * output + self.path.d_sigma(t) * x_t) / sigma

    def data(self, output, x_t, t):
        return output

    def target(self, x1, x0, x_t, t):
        return self.velocity(x1, x_t, t)


PREDICTIONS = {"velocity": Velocity, "score": Score, "noise": Noise, "x": Data}
