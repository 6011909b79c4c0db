"""Distribution matching distillation (DMD2, arXiv 2405.14867): what a student of a few steps minimises, and its steps.

The student maps a noisy x at one of its times to data x1. Its samples come from alternating that map with new noise. A
sample is noised once more, and two networks say what data they see behind it: the teacher ("real") and a network that
is trained on the student's samples ("fake"). The difference moves the sample towards the teacher's distribution.

Noise levels are s = 1 - t, 1 for noise and 0 for data. A network of these functions is a prediction of data, (x_t
[B, H, W, C], t [B]) -> x1.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from dar_jax import diffusion
from dar_jax.diffusion.path import Path, expand
from dar_jax.diffusion.schedule import shift_time
from dar_jax.errors import check_choice, require

Predict = Callable[[Array, Array], Array]

FLOOR = 1e-6  # the least normaliser of a gradient
BETA = (4.0, 1.5)  # of the noise levels at the start, with dmd.renoise = "beta" (DMDR)
ALGORITHMS = ("flow", "dmd")
SIMULATIONS = ("stochastic", "ode")
RENOISES = ("uniform", "beta")


def student_times(settings: ConfigDict, ends: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """The times of the student's steps and their end, `[num_steps + 1]` from noise to data, within `ends`."""
    s = shift_time(np.linspace(1.0, 0.0, settings.num_steps + 1), settings.shift)
    return ends[0] + (ends[1] - ends[0]) * (1 - s)


def step_inputs(
    student: Predict, settings: ConfigDict, path: Path, times: np.ndarray, x0: Array, keys: Array, steps: Array | int
) -> Array:
    """x at the time of step `steps` (0-based), after so many steps from the noise x0: backward simulation.

    Args:
      student: the student's prediction of data.
      settings: `config.dmd`.
      path: of the noising.
      times: of `student_times`.
      x0: noise `[B, H, W, C]`.
      keys: `[B]` typed keys; the noise that follows step k of sample i comes from fold_in(keys[i], k).
      steps: how many steps to take, which may be traced.
    """
    grid = jnp.asarray(times, x0.dtype)

    def step(k: Array, x: Array) -> Array:
        t, t_next = (jnp.broadcast_to(grid[i], x.shape[:1]) for i in (k, k + 1))
        x1 = student(x, t)
        if settings.simulation == "ode":
            noise = (x - path.alpha(expand(t, x)) * x1) / path.sigma(expand(t, x))
        else:
            fresh = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(fresh)
        return path.interpolate(x1, noise, t_next)

    return jax.lax.fori_loop(0, steps, step, x0)


def sample(student: Predict, settings: ConfigDict, path: Path, times: np.ndarray, x0: Array, keys: Array) -> Array:
    """Samples x1 of all steps of the student from the noise x0; arguments as of `step_inputs`."""
    last = settings.num_steps - 1
    x = step_inputs(student, settings, path, times, x0, keys, last)
    return student(x, jnp.full(x.shape[:1], times[last], x.dtype))


def build_sample(config: ConfigDict, model: nn.Module) -> Callable[[dict, Array, Array, dict], Array]:
    """(params, x0, keys, condition) -> samples of the student `model`, as `objectives.Objective.sample`."""
    process = diffusion.build(config.diffusion)
    times = student_times(config.dmd, process.prediction.time_range(sampling=True))

    def draw(params: dict, x0: Array, keys: Array, condition: dict) -> Array:
        def student(x_t: Array, t: Array) -> Array:
            return process.prediction.data(model.apply({"params": params}, x_t, t, condition).prediction, x_t, t)

        return sample(student, config.dmd, process.path, times, x0, keys)

    return draw


def draw_levels(key: Array, count: int, settings: ConfigDict, step: Array) -> Array:
    """Noise levels of the comparison, `[count]` float32, as `config.dmd` says at the training step `step`."""
    if settings.renoise == "beta":
        a, b = (1 + annealed(settings, step) * (end - 1) for end in BETA)
        unit = jax.random.beta(key, a, b, (count,), jnp.float32)
    else:
        unit = jax.random.uniform(key, (count,), jnp.float32)
    low, high = settings.renoise_range
    return low + (high - low) * shift_time(unit, settings.renoise_shift)


def annealed(settings: ConfigDict, step: Array) -> Array:
    """A cosine from 1 at step 0 to 0 at `dmd.anneal_steps` and after."""
    return 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.minimum(step / settings.anneal_steps, 1.0))


def gradient(x1: Array, fake: Array, real: Array) -> Array:
    """The direction (fake - real) / mean |x1 - real|, by sample, that leads away from the teacher's distribution.

    Args:
      x1: samples of the student `[B, ...]`, clean.
      fake, real: the data that both networks see behind the noised samples.
    """
    return (fake - real) / _distance(x1, real)


def guidance_gradient(x1: Array, real: Array, unconditional: Array, scale: float, normaliser: Array) -> Array:
    """The part of the gradient that guidance makes, -(scale - 1)(real - unconditional) / mean |x1 - normaliser|.

    Decoupled DMD (arXiv 2511.22677) measures it at noise levels of its own. `real` and `unconditional` are the data
    that the teacher sees with the condition and without, and `normaliser` what it sees at the levels of `gradient`.
    """
    return -(scale - 1) * (real - unconditional) / _distance(x1, normaliser)


def _distance(x1: Array, seen: Array) -> Array:
    """mean |x1 - seen| of each sample `[B, 1, ...]`, at least `FLOOR`."""
    return jnp.maximum(jnp.mean(jnp.abs(x1 - seen), axis=tuple(range(1, x1.ndim)), keepdims=True), FLOOR)


def matching_loss(x1: Array, direction: Array) -> Array:
    """A loss whose gradient by x1 is `direction` / the number of values in x1: half the mean of (x1 - target)^2."""
    target = jax.lax.stop_gradient(x1 - direction)
    return 0.5 * jnp.mean((x1 - target) ** 2)


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of `config.dmd` that cannot work."""
    settings = config.dmd
    check_choice("config.dmd.simulation", settings.simulation, SIMULATIONS)
    check_choice("config.dmd.renoise", settings.renoise, RENOISES)
    require(
        len(settings.renoise_range) == 2 and 0 <= settings.renoise_range[0] < settings.renoise_range[1] <= 1,
        f"config.dmd.renoise_range = {settings.renoise_range} must be two levels, 0 <= low < high <= 1.",
    )
    check_choice("config.algorithm", config.algorithm, ALGORITHMS)
    if config.algorithm != "dmd":
        return
    require(
        settings.real_scale == 0 or settings.fake_rank > 0,
        f"config.dmd.real_scale = {settings.real_scale} scales the adapters of the fake score; set dmd.fake_rank, or "
        "real_scale = 0.",
    )
    require(
        config.repa.target == "none" and config.eval.loss_images == 0,
        "config.algorithm = dmd has no use for config.repa.target and eval.loss_images: a student is no velocity; set "
        'them to "none" and 0.',
    )
