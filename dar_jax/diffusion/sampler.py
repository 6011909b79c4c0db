"""Sampling: integrate the probability-flow ODE or an SDE from noise (t = 0) to data (t = 1).

SiT (arXiv 2401.08740): dx = v dt is the ODE, dx = (v + D score) dt + sqrt(2 D) dW the SDE; both have the
marginals of the interpolant for every D(t) >= 0. All arithmetic is elementwise over the batch: sample i
depends on x0[i], keys[i] and its label alone, whatever else is in the batch and however the batch is
sharded.

What `num_steps` = N means, and the network evaluations it costs per sample:

    euler      N equal intervals over `time_range`                                              N
    heun       the same, trapezoidal                                                            2 N
    sde_euler  N - 1 noisy Euler-Maruyama intervals over [t0, 1 - last_step_size], last step    N
    sde_heun   N - 1 noisy Heun intervals over the same, last step                              2 N - 1
    dopri5     N is not used; the step size follows atol and rtol                               unknown

With last_step = "none" all N intervals are noisy and end at 1 - TIME_MARGIN; sde_heun then costs 2 N.
The official 250 evaluations are sde_euler with N = 250: 249 noisy steps over [0, .96], a last step of .04.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dar_jax.diffusion.interpolant import (
    TIME_MARGIN,
    Interpolant,
    expand,
    get_interpolant,
    time_range,
    to_noise,
    to_score,
    to_velocity,
)
from dar_jax.errors import UserError, check_choice

Array = jax.Array

METHODS = ("euler", "heun", "dopri5", "sde_euler", "sde_heun")
DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
LAST_STEPS = ("none", "mean", "tweedie", "euler")

DOPRI5_MAX_ATTEMPTS = 1000  # accepted and rejected steps of a sample before it is given up


def check(sampler: ConfigDict) -> None:
    """Raises UserError for the first field of config.sampler that `sample` could not work with."""
    check_choice("config.sampler.method", sampler.method, METHODS)
    if sampler.num_steps < 1:
        raise UserError(f"config.sampler.num_steps = {sampler.num_steps} must be at least 1.")
    if sampler.method == "dopri5":
        for field in ("atol", "rtol"):
            if sampler[field] <= 0:
                raise UserError(f"config.sampler.{field} = {sampler[field]} must be positive.")
    if not sampler.method.startswith("sde"):
        return
    check_choice("config.sampler.diffusion_form", sampler.diffusion_form, DIFFUSION_FORMS)
    check_choice("config.sampler.last_step", sampler.last_step, LAST_STEPS)
    if sampler.diffusion_norm < 0:
        raise UserError(f"config.sampler.diffusion_norm = {sampler.diffusion_norm} must not be negative.")
    if sampler.last_step == "none":
        return
    if sampler.num_steps < 2:
        raise UserError(
            f"config.sampler.num_steps = {sampler.num_steps} must be at least 2: "
            f'the last step ("{sampler.last_step}") is one of them.'
        )
    if not TIME_MARGIN <= sampler.last_step_size < 1 - TIME_MARGIN:
        raise UserError(
            f"config.sampler.last_step_size = {sampler.last_step_size} must be in "
            f"[{TIME_MARGIN}, {1 - TIME_MARGIN}); "
            'to leave the last step out, set last_step = "none".'
        )


def _num_intervals(sampler: ConfigDict) -> int:
    """Returns the intervals of the fixed-step solvers before the last step, if there is one."""
    has_last = sampler.method.startswith("sde") and sampler.last_step != "none"
    return sampler.num_steps - has_last


def num_evaluations(sampler: ConfigDict) -> int | None:
    """Returns the network calls per sample, None for dopri5; guidance doubles a call's batch, not the count.

    Raises UserError if the sampler cannot work.
    """
    check(sampler)
    if sampler.method == "dopri5":
        return None
    intervals = _num_intervals(sampler)
    per_interval = 2 if sampler.method in ("heun", "sde_heun") else 1
    return per_interval * intervals + (sampler.num_steps - intervals)


def diffusion_coefficient(form: str, norm: float, interpolant: Interpolant, t: Array) -> Array:
    """Returns D(t), of the shape of t, for a form of SiT's table of diffusions; `sbdm` needs alpha_t > 0.

    constant 1, sbdm sigma W / alpha (the reverse of the forward noising SDE), sigma, linear 1 - t and
    increasing_decreasing sin^2(pi t) are multiplied by `norm`; decreasing is (norm cos(pi t) + 1)^2 / 4.
    """
    if form == "decreasing":
        return 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2
    unscaled = {
        "constant": jnp.ones_like,
        "sbdm": lambda t: interpolant.sigma(t) * interpolant.determinant(t) / interpolant.alpha(t),
        "sigma": interpolant.sigma,
        "linear": lambda t: 1 - t,
        "increasing_decreasing": lambda t: jnp.sin(jnp.pi * t) ** 2,
    }
    return norm * unscaled[form](t)


def _sde_range(sampler: ConfigDict, diffusion: ConfigDict) -> tuple[float, float]:
    """Returns the ends of the noisy steps. The score needs sigma_t > 0 at both, sbdm also alpha_t > 0."""
    t0, _ = time_range(diffusion.interpolant, diffusion.prediction, sampling=True)
    if sampler.diffusion_form == "sbdm" and diffusion.interpolant != "vp":
        t0 = TIME_MARGIN
    return t0, 1.0 - (TIME_MARGIN if sampler.last_step == "none" else sampler.last_step_size)


def sample(
    predict: Callable[[Array, Array], Array],
    x0: Array,
    keys: Array,
    sampler: ConfigDict,
    diffusion: ConfigDict,
) -> Array:
    """Integrates from the noise x0 to samples; a pure function, to be jitted with the batch sharded at will.

    The result is at the end of the range. Where that is short of 1 (ODE: see `time_range`; SDE: last_step =
    "none") it keeps noise of standard deviation sigma there: 1e-3 linear, 1.6e-3 GVP, 1e-2 VP.

    Args:
      predict: (x_t [B, H, W, C] float32, t [B] float32) -> output [B, H, W, C] as diffusion.prediction says.
      x0: [B, H, W, C], N(0, 1).
      keys: [B] typed PRNG keys; the SDE's noise of sample i in interval k comes from fold_in(keys[i], k).
      sampler: config.sampler. diffusion: config.diffusion.

    Returns:
      [B, H, W, C] float32; NaN for a sample on which dopri5 gave up.

    Raises:
      UserError: a value in `sampler` or `diffusion` cannot work (see `check`).
    """
    check(sampler)
    interpolant, prediction = get_interpolant(diffusion.interpolant), diffusion.prediction
    is_sde = sampler.method.startswith("sde")
    t0, t1 = time_range(diffusion.interpolant, prediction, sampling=True)
    x0 = x0.astype(jnp.float32)

    def output_at(x: Array, t: Array) -> Array:
        return predict(x, t).astype(jnp.float32)

    def velocity(x: Array, t: Array) -> Array:
        return to_velocity(output_at(x, t), x, t, interpolant, prediction)

    def variance_rate(t: Array) -> Array:
        return diffusion_coefficient(sampler.diffusion_form, sampler.diffusion_norm, interpolant, t)

    def sde_drift(x: Array, t: Array) -> Array:
        output = output_at(x, t)
        score = to_score(output, x, t, interpolant, prediction)
        return to_velocity(output, x, t, interpolant, prediction) + expand(variance_rate(t), x) * score

    if sampler.method == "dopri5":
        return dopri5(velocity, x0, t0, t1, atol=sampler.atol, rtol=sampler.rtol)[0]

    if is_sde:
        t0, t1 = _sde_range(sampler, diffusion)
    drift = sde_drift if is_sde else velocity
    intervals = _num_intervals(sampler)
    times = np.linspace(t0, t1, intervals + 1)
    dt = (t1 - t0) / intervals

    def at(t: Array) -> Array:
        return jnp.broadcast_to(t, x0.shape[:1])

    def kick(t: Array, k: Array) -> Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], jnp.float32))(step_keys)
        return jnp.sqrt(2 * dt * variance_rate(t)) * noise

    def step(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, t_next, k = inputs
        if sampler.method == "sde_heun":
            # The noise comes first, as in the official solver: both slopes then see the same noise.
            x = x + kick(t, k)
        slope = drift(x, at(t))
        if sampler.method in ("heun", "sde_heun"):
            slope = 0.5 * (slope + drift(x + dt * slope, at(t_next)))
        x_next = x + dt * slope
        if sampler.method == "sde_euler":
            x_next = x_next + kick(t, k)
        return x_next, None

    grid = (jnp.asarray(times[:-1], jnp.float32), jnp.asarray(times[1:], jnp.float32), jnp.arange(intervals))
    x, _ = jax.lax.scan(step, x0, grid)
    if not is_sde or sampler.last_step == "none":
        return x

    t_last = at(jnp.float32(t1))
    if sampler.last_step == "tweedie":
        # E[x1 | x_t] = (x_t + sigma^2 score) / alpha = (x_t - sigma E[x0 | x_t]) / alpha.
        noise = to_noise(output_at(x, t_last), x, t_last, interpolant, prediction)
        t_last = expand(t_last, x)
        return (x - interpolant.sigma(t_last) * noise) / interpolant.alpha(t_last)
    slope = sde_drift(x, t_last) if sampler.last_step == "mean" else velocity(x, t_last)
    return x + sampler.last_step_size * slope


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
