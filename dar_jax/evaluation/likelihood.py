"""Bits per dimension of held-out images under a run's EMA."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax import diffusion, models, sharding
from dar_jax.data.sources import open_source
from dar_jax.diffusion.likelihood import log_likelihood
from dar_jax.errors import require
from dar_jax.evaluation.sampling import restore
from dar_jax.evaluation.validation import held_out_batches
from dar_jax.logs import say

LEVEL = 2 / 255  # between two grey levels of images in [-1, 1]
STREAM = 2**32 - 5  # of the seed's random streams, for the noise within a level and the probes


def likelihood_of_run(config: ConfigDict, workdir: str, step: int | None) -> dict:
    """The likelihood of `config.eval.num_samples` images of `config.data.eval_split`, or all, without guidance.

    Uniform noise within a grey level makes densities of whole numbers (arXiv 1511.01844). The ODE takes
    `config.sampler.num_steps` steps of Heun's method, and once more half of them, to show what they are worth.

    Returns:
      {"bits_per_dim", "interval" (half of 95 % over images), "half_the_steps" (bits per dim with them), "num_images",
      "num_steps", "step"}.

    Raises:
      UserError: something does not fit, before anything is computed.
    """
    require(
        config.model.space == "pixels",
        f"--likelihood is of pixels, and config.model.space = {config.model.space}: a likelihood of latents says "
        "nothing of images.",
    )
    require(
        config.algorithm == "flow",
        f"--likelihood needs a velocity at every time, and a student of config.algorithm = {config.algorithm} has "
        "none.",
    )
    require(
        config.sampler.num_steps >= 2 and config.sampler.num_steps % 2 == 0,
        f"--steps = {config.sampler.num_steps} must be even, because half of them are tried too.",
    )
    available = len(open_source(config.data, config.data.eval_split))
    count = min(config.eval.num_samples, available)
    if count < config.eval.num_samples:
        say(f'split "{config.data.eval_split}" has {available} images, fewer than {config.eval.num_samples}')
    sharding.fit(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    process, model = diffusion.build(config.diffusion), models.build(config.model)
    times = process.prediction.time_range(sampling=True)

    def bits(params, batch: dict, number, num_steps: int):
        stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), STREAM), number)
        noise_key, probe_key = jax.random.split(stream)
        x1 = batch["x1"] + LEVEL * (jax.random.uniform(noise_key, batch["x1"].shape) - 0.5)

        def velocity(x_t, t):
            output = model.apply({"params": params}, x_t, t, batch["condition"]).prediction
            return process.prediction.velocity(output, x_t, t)

        probe = jax.random.rademacher(probe_key, x1.shape, x1.dtype)
        nats = log_likelihood(velocity, process.path, x1, probe, times=times, num_steps=num_steps)
        return -nats / (x1[0].size * jnp.log(2)) - jnp.log2(LEVEL)

    with sharding.use(mesh):
        ema, step = restore(config, workdir, mesh, step)
        everywhere = NamedSharding(mesh, PartitionSpec())  # so that every process has the numbers
        measure, steps = jax.jit(bits, static_argnums=3, out_shardings=everywhere), config.sampler.num_steps
        found = {steps: [], steps // 2: []}
        for number, batch in enumerate(held_out_batches(config, mesh, count)):
            for num_steps, values in found.items():
                values.append(np.asarray(jax.device_get(measure(ema, batch, number, num_steps))))
            say(f"{min(count, sum(map(len, found[steps])))} of {count} images")
    fine, coarse = (np.concatenate(values)[:count] for values in found.values())
    return {
        "bits_per_dim": float(fine.mean()),
        "interval": float(1.96 * fine.std(ddof=1) / np.sqrt(len(fine))),
        "half_the_steps": float(coarse.mean()),
        "num_images": len(fine),
        "num_steps": steps,
        "step": step,
    }


def table(found: dict) -> str:
    """What `likelihood_of_run` found, for people."""
    line = (
        f"{found['bits_per_dim']:.4f} ± {found['interval']:.4f} bits per dimension of {found['num_images']} images, "
        f"step {found['step']}, {found['num_steps']} steps of Heun (with half of them: {found['half_the_steps']:.4f})"
    )
    if abs(found["bits_per_dim"] - found["half_the_steps"]) > found["interval"]:
        line += "\nwarning: the steps make more difference than the images; give more --steps"
    return line
