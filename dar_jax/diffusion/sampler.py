"""Sampling: integrate the probability-flow ODE or an SDE from noise (t = 0) to data (t = 1).

SiT (arXiv 2401.08740): dx = v dt is the ODE, dx = (v + D score) dt + sqrt(2 D) dW the SDE; both have the
marginals of the path for every D(t) >= 0. All arithmetic is elementwise over the batch: sample i depends on
x0[i], keys[i] and its condition alone, whatever else is in the batch and however the batch is sharded.

What `num_steps` = N means, and the network evaluations it costs per sample:

    euler      N intervals over `Prediction.time_range`, as config.sampler.schedule sets them   N
    heun       the same, trapezoidal                                                            2 N
    sde_euler  N - 1 noisy Euler-Maruyama intervals over [t0, 1 - last_step_size], last step    N
    sde_heun   N - 1 noisy Heun intervals over the same, last step                              2 N - 1
    dopri5     N is not used; the step size follows atol and rtol                               unknown

With last_step = "none" all N intervals are noisy and end at 1 - TIME_MARGIN; sde_heun then costs 2 N.
The official 250 evaluations are sde_euler with N = 250: 249 noisy steps over [0, .96], a last step of .04.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dar_jax.diffusion.path import TIME_MARGIN, Path, expand
from dar_jax.diffusion.process import Diffusion
from dar_jax.diffusion.schedule import SCHEDULES, check_shifted
from dar_jax.errors import UserError, check_choice, check_number

Array = jax.Array

DOPRI5_MAX_ATTEMPTS = 1000  # accepted and rejected steps of a sample before it is given up


def _euler(drift: Callable, x: Array, t: Array, t_next: Array, dt: Array, kick: Array | None) -> Array:
    return x + dt * drift(x, t)


def _heun(drift: Callable, x: Array, t: Array, t_next: Array, dt: Array, kick: Array | None) -> Array:
    slope = drift(x, t)
    slope = 0.5 * (slope + drift(x + dt * slope, t_next))
    return x + dt * slope


def _sde_euler(drift: Callable, x: Array, t: Array, t_next: Array, dt: Array, kick: Array | None) -> Array:
    return _euler(drift, x, t, t_next, dt, None) + kick


def _sde_heun(drift: Callable, x: Array, t: Array, t_next: Array, dt: Array, kick: Array | None) -> Array:
    # The noise comes first, as in the official solver: both slopes then see the same noise.
    return _heun(drift, x + kick, t, t_next, dt, None)


class Method(NamedTuple):
    """A solver.

    Attributes:
      step: (drift, x, t [B], t_next [B], dt, kick) -> x at t_next. None: the solver chooses its own steps.
      evaluations: network calls of a step; None: unknown.
      is_sde: whether the SDE is integrated. Its noise in a step is `kick`, which is None for the ODE.
    """

    step: Callable | None
    evaluations: int | None
    is_sde: bool = False


METHODS = {
    "euler": Method(_euler, 1),
    "heun": Method(_heun, 2),
    "dopri5": Method(None, None),
    "sde_euler": Method(_sde_euler, 1, is_sde=True),
    "sde_heun": Method(_sde_heun, 2, is_sde=True),
}


class Form(NamedTuple):
    """A form of D in SiT's table of diffusions.

    Attributes:
      rate: (path, norm, t) -> D(t), of the shape of t; norm is config.sampler.diffusion_norm.
      divides_by_alpha: whether D(t) is infinite where alpha_t = 0.
    """

    rate: Callable[[Path, float, Array], Array]
    divides_by_alpha: bool = False


# sbdm is the reverse of the forward noising SDE.
DIFFUSION_FORMS = {
    "constant": Form(lambda path, norm, t: norm * jnp.ones_like(t)),
    "sbdm": Form(
        lambda path, norm, t: norm * (path.sigma(t) * path.determinant(t) / path.alpha(t)), divides_by_alpha=True
    ),
    "sigma": Form(lambda path, norm, t: norm * path.sigma(t)),
    "linear": Form(lambda path, norm, t: norm * (1 - t)),
    "decreasing": Form(lambda path, norm, t: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2),
    "increasing_decreasing": Form(lambda path, norm, t: norm * jnp.sin(jnp.pi * t) ** 2),
}

Rate = Callable[[Array], Array]


def _sde_drift(diffusion: Diffusion, rate: Rate, output: Array, x: Array, t: Array) -> Array:
    """v + D score."""
    score = diffusion.prediction.score(output, x, t)
    return diffusion.prediction.velocity(output, x, t) + expand(rate(t), x) * score


def _mean(diffusion: Diffusion, rate: Rate, output: Array, x: Array, t: Array, size: float) -> Array:
    return x + size * _sde_drift(diffusion, rate, output, x, t)


def _tweedie(diffusion: Diffusion, rate: Rate, output: Array, x: Array, t: Array, size: float) -> Array:
    """E[x1 | x_t] = (x_t + sigma^2 score) / alpha = (x_t - sigma E[x0 | x_t]) / alpha."""
    noise = diffusion.prediction.noise(output, x, t)
    t = expand(t, x)
    return (x - diffusion.path.sigma(t) * noise) / diffusion.path.alpha(t)


def _velocity(diffusion: Diffusion, rate: Rate, output: Array, x: Array, t: Array, size: float) -> Array:
    return x + size * diffusion.prediction.velocity(output, x, t)


# What is done without noise from t = 1 - last_step_size on; None: nothing, and the noisy steps go further.
LAST_STEPS = {"none": None, "mean": _mean, "tweedie": _tweedie, "euler": _velocity}


def _has_last_step(section: ConfigDict) -> bool:
    return METHODS[section.method].is_sde and LAST_STEPS[section.last_step] is not None


def check(section: ConfigDict) -> None:
    """Raises UserError for the first field of config.sampler that cannot work, whatever the process."""
    check_choice("config.sampler.method", section.method, METHODS)
    check_choice("config.sampler.diffusion_form", section.diffusion_form, DIFFUSION_FORMS)
    check_choice("config.sampler.last_step", section.last_step, LAST_STEPS)
    check_choice("config.sampler.schedule", section.schedule, SCHEDULES)
    if section.schedule == "shifted":
        check_shifted(section)

    def require(condition: bool, field: str, rule: str) -> None:
        if not condition:
            raise UserError(f"config.sampler.{field} = {section[field]} must be {rule}.")

    if _has_last_step(section):
        last = f'the last step ("{section.last_step}")'
        require(section.num_steps >= 2, "num_steps", f"at least 2: {last} is one of them")
        require(
            TIME_MARGIN <= section.last_step_size < 1 - TIME_MARGIN,
            "last_step_size",
            f'in [{TIME_MARGIN}, {1 - TIME_MARGIN}); to leave the last step out, set last_step = "none"',
        )
    interval = section.cfg_interval
    require(len(interval) == 2, "cfg_interval", "(low, high)")
    for i, end in enumerate(interval):
        check_number(f"config.sampler.cfg_interval[{i}]", end, float, "[0, 1]")
    require(interval[0] <= interval[1], "cfg_interval", "(low, high), low <= high")


def num_evaluations(section: ConfigDict) -> int | None:
    """Network calls per sample, None for dopri5; guidance doubles a call's batch, not the count.

    Raises UserError if `check` does.
    """
    check(section)
    method, last = METHODS[section.method], _has_last_step(section)
    return None if method.step is None else method.evaluations * (section.num_steps - last) + last


def build(section: ConfigDict, diffusion: Diffusion, patch_size: int) -> Callable[[Callable, Array, Array], Array]:
    """Returns sample(predict, x0, keys) -> x1 of config.sampler: the integral from the noise x0 to samples.

    It is a pure function, to be jitted with the batch sharded at will.

    patch_size: side of the network's tokens, by whose number a schedule may go.
    predict: (x_t [B, H, W, C] float32, t [B] float32) -> output [B, H, W, C], what `diffusion.prediction` says.
    x0: [B, H, W, C], N(0, 1).
    keys: [B] typed PRNG keys; the SDE's noise of sample i in interval k comes from fold_in(keys[i], k).
    x1: [B, H, W, C] float32 at the end of the range; NaN for a sample on which dopri5 gave up. Where the range ends
      short of 1 (ODE: see `Prediction.time_range`; SDE: last_step = "none") it keeps noise of standard deviation sigma
      there: 1e-3 linear, 1.6e-3 GVP, 1e-2 VP.

    Raises:
      UserError: a value in the section cannot work (see `check`).
    """
    check(section)
    method, form, last_step = METHODS[section.method], DIFFUSION_FORMS[section.diffusion_form], None
    norm, size, atol, rtol = section.diffusion_norm, section.last_step_size, section.atol, section.rtol
    t0, t1 = diffusion.prediction.time_range(sampling=True)
    intervals = section.num_steps - _has_last_step(section)
    if method.is_sde:
        last_step = LAST_STEPS[section.last_step]
        # The score needs sigma_t > 0 at both ends.
        t1 = 1.0 - (size if last_step else TIME_MARGIN)
        if form.divides_by_alpha and diffusion.path.starts_as_noise:
            t0 = TIME_MARGIN

    def rate(t: Array) -> Array:
        return form.rate(diffusion.path, norm, t)

    def sample(predict: Callable[[Array, Array], Array], x0: Array, keys: Array) -> Array:
        x0 = x0.astype(jnp.float32)

        def output_at(x: Array, t: Array) -> Array:
            return predict(x, t).astype(jnp.float32)

        def drift(x: Array, t: Array) -> Array:
            output = output_at(x, t)
            if method.is_sde:
                return _sde_drift(diffusion, rate, output, x, t)
            return diffusion.prediction.velocity(output, x, t)

        if method.step is None:
            return dopri5(drift, x0, t0, t1, atol=atol, rtol=rtol)[0]

        num_tokens = (x0.shape[1] // patch_size) * (x0.shape[2] // patch_size)
        times = t0 + (t1 - t0) * SCHEDULES[section.schedule](section, num_tokens, intervals)

        def at(t: Array) -> Array:
            return jnp.broadcast_to(t, x0.shape[:1])

        def kick(t: Array, dt: Array, k: Array) -> Array:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], jnp.float32))(step_keys)
            return jnp.sqrt(2 * dt * rate(t)) * noise

        def step(x: Array, inputs: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
            t, t_next, dt, k = inputs
            return method.step(drift, x, at(t), at(t_next), dt, kick(t, dt, k) if method.is_sde else None), None

        grid = (jnp.asarray(part, jnp.float32) for part in (times[:-1], times[1:], np.diff(times)))
        x, _ = jax.lax.scan(step, x0, (*grid, jnp.arange(intervals)))
        if last_step is None:
            return x
        t_last = at(jnp.float32(t1))
        return last_step(diffusion, rate, output_at(x, t_last), x, t_last, size)

    return sample


# Dormand & Prince (1980), 5(4) pair. Row i gives stage i + 1 from the slopes before it; the last row is the
# 5th-order solution, whose slope is the first one of the next step (FSAL).
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5, 0, 0, 0, 0, 0, 0),
    (3 / 40, 9 / 40, 0, 0, 0, 0, 0),
    (44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # 5th minus 4th order


def dopri5(
    velocity: Callable[[Array, Array], Array], x: Array, t0: float, t1: float, *, atol: float, rtol: float
) -> tuple[Array, Array]:
    """Integrates dx/dt = velocity(x, t) from t0 to t1 with a step size of its own for every sample.

    A step is accepted if the root mean square over the sample of error / (atol + rtol max(|x|, |x_next|))
    is at most 1; the next size is this one times .9 rms^(-1/5), held in [.2, 10] (Hairer, Norsett & Wanner,
    II.4). The batch is evaluated until its slowest sample arrives; a sample that arrived is left as it is.

    Args:
      velocity: (x [B, ...] float32, t [B] float32) -> [B, ...] float32.
      x: [B, ...] float32 at t0.
      atol, rtol: tolerances, positive.

    Returns:
      x at t1 [B, ...]: NaN for a sample whose step size underflowed (as with a NaN velocity) or which had not
      arrived after DOPRI5_MAX_ATTEMPTS steps; and the evaluations [B] int32 each sample used, 1 + 6 per
      attempted step.
    """
    axes = tuple(range(1, x.ndim))

    def rms(value: Array) -> Array:
        return jnp.sqrt(jnp.mean(value**2, axis=axes))

    def weighted(weights: Array, slopes: Array) -> Array:
        # Not a tensordot: accelerators would round its operands to bfloat16.
        return jnp.sum(weights.reshape(-1, *(1,) * x.ndim) * slopes, axis=0)

    def is_running(t: Array, dt: Array, attempts: Array) -> Array:
        return (t < t1) & (t + dt > t) & (attempts < DOPRI5_MAX_ATTEMPTS)

    def attempt(carry):
        x, slope, t, dt, attempts = carry
        is_last = dt >= t1 - t
        h = jnp.where(is_last, t1 - t, dt)
        t_next = jnp.where(is_last, t1, t + h)

        def stage(i, state):
            slopes, _ = state
            x_stage = x + expand(h, x) * weighted(stages[i], slopes)
            return slopes.at[i + 1].set(velocity(x_stage, jnp.minimum(t + nodes[i] * h, t1))), x_stage

        slopes = jnp.zeros((7, *x.shape), jnp.float32).at[0].set(slope)
        # One traced network call instead of six.
        slopes, x_next = jax.lax.fori_loop(0, 6, stage, (slopes, x))

        tolerance = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(x_next))
        error = rms(expand(h, x) * weighted(errors, slopes) / tolerance)  # [B]
        factor = jnp.where(jnp.isnan(error), 0.2, jnp.clip(0.9 * error**-0.2, 0.2, 10.0))

        running = is_running(t, dt, attempts)
        accept = running & (error <= 1)
        return (
            jnp.where(expand(accept, x), x_next, x),
            jnp.where(expand(accept, x), slopes[6], slope),
            jnp.where(accept, t_next, t),
            jnp.where(running, h * factor, dt),
            attempts + running,
        )

    nodes, stages, errors = (jnp.asarray(table, jnp.float32) for table in (_NODES, _STAGES, _ERROR))
    t = jnp.full(x.shape[:1], t0, jnp.float32)
    slope = velocity(x, t)
    # A hundredth of the time in which x would change by its own size; the controller soon corrects it.
    tolerance = atol + rtol * jnp.abs(x)
    dt = 0.01 * rms(x / tolerance) / jnp.maximum(rms(slope / tolerance), 1e-10)
    dt = jnp.clip(dt, 1e-4 * (t1 - t0), t1 - t0)

    carry = (x, slope, t, dt, jnp.zeros(x.shape[:1], jnp.int32))
    x, _, t, _, attempts = jax.lax.while_loop(lambda carry: jnp.any(is_running(*carry[2:])), attempt, carry)
    return jnp.where(expand(t < t1, x), jnp.nan, x), 1 + 6 * attempts
