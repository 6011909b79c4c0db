"""Classifier-free guidance (arXiv 2207.12598) on the network's own prediction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dar_jax.diffusion.interpolant import expand
from dar_jax.errors import UserError

Array = jax.Array


def guided(
    predict: Callable[[Array, Array, Array], Array],
    y: Array,
    num_classes: int,
    *,
    scale: float | Array,
    channels: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Array, Array], Array]:
    """Returns predict(x, t) whose output is uncond + scale * (cond - uncond), from one call on a batch of 2B.

    It acts on what the network itself predicts. Velocity, score and noise at one (x_t, t) are affine in each
    other, element by element, so guiding any of them is the same guidance.

    Args:
      predict: (x [B, H, W, C], t [B], y [B] int) -> output [B, H, W, C].
      y: [B] labels in [0, num_classes); the null label is num_classes.
      scale: guidance scale; may be traced. The Python number 1 drops the unconditional half altogether.
      channels: guide only the first that many channels, the others take the conditional output (official SiT
        and DiT: 3 of 4); 0 = all.
      interval: guide only samples with low <= t <= high (arXiv 2404.07724), the others take the conditional
        output. t = 0 is noise: REPA's "noise levels below 0.7" are t > 0.3, (0.3, 1).

    Raises:
      UserError: the interval is not 0 <= low <= high <= 1, or there are fewer channels than `channels`.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"config.sampler.cfg_interval = ({low}, {high}) must satisfy 0 <= low <= high <= 1.")
    if channels < 0:
        raise UserError(f"config.sampler.cfg_channels = {channels} must be 0 (all) or a number of channels.")
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: predict(x, t, y)

    def predict_guided(x: Array, t: Array) -> Array:
        if channels > x.shape[-1]:
            raise UserError(f"config.sampler.cfg_channels = {channels} must be at most {x.shape[-1]}, the model's.")
        # A sample's two rows are neighbours, so that they stay on its device when the batch is sharded.
        labels = jnp.stack([y, jnp.full_like(y, num_classes)], axis=1).reshape(-1)  # [2B]
        output = predict(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), labels)  # [2B, H, W, C]
        output = output.reshape(x.shape[0], 2, *output.shape[1:]).astype(jnp.float32)
        cond, uncond = output[:, 0], output[:, 1]

        extra = jnp.where((low <= t) & (t <= high), scale - 1.0, 0.0).astype(jnp.float32)  # [B]
        update = expand(extra, x) * (cond - uncond)
        if channels:
            update = update.at[..., channels:].set(0)
        return cond + update

    return predict_guided
