"""Classifier-free guidance (arXiv 2207.12598) on the network's own prediction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dar_jax.conditions import Condition, interleave
from dar_jax.diffusion.path import expand

Array = jax.Array


def guided(
    predict: Callable[[Array, Array, Condition], Array],
    condition: Condition,
    null: Condition,
    *,
    scale: float | Array,
    channels: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescaled_patch: int = 0,
) -> Callable[[Array, Array], Array]:
    """Returns predict(x_t, t) whose output is uncond + scale * (cond - uncond), from one call on a batch of 2B.

    It acts on what the network itself predicts. Velocity, score, noise and data at one (x_t, t) are affine in each
    other, element by element, so guiding any of them is the same guidance.

    Args:
      predict: (x_t [B, H, W, C], t [B], condition) -> output [B, H, W, C].
      condition: of each sample; a tree of arrays [B, ...].
      null: the null condition of each sample, a tree like `condition`.
      scale: guidance scale; may be traced. The Python number 1 drops the unconditional half altogether.
      channels: guide only the first that many channels, the others take the conditional output (official SiT
        and DiT: 3 of 4); 0 = all.
      interval: guide only samples with low <= t <= high (arXiv 2404.07724), the others take the conditional
        output. t = 0 is noise: REPA's "noise levels below 0.7" are t > 0.3, (0.3, 1).
      rescaled_patch: side p of the tokens p x p x C whose guided output is scaled to the norm of the conditional one;
        0 = no scaling. It is Qwen-Image's guidance of a velocity. Of other outputs it is another guidance.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x_t, t: predict(x_t, t, condition)
    low, high = interval

    def predict_guided(x_t: Array, t: Array) -> Array:
        output = predict(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), interleave(condition, null))  # [2B, H, W, C]
        dtype = jnp.promote_types(output.dtype, jnp.float32)
        output = output.reshape(x_t.shape[0], 2, *output.shape[1:]).astype(dtype)
        cond, uncond = output[:, 0], output[:, 1]

        extra = jnp.where((low <= t) & (t <= high), scale - 1.0, 0.0).astype(dtype)  # [B]
        update = expand(extra, x_t) * (cond - uncond)
        if channels:
            update = update.at[..., channels:].set(0)
        if rescaled_patch:
            return _with_norms_of(cond, cond + update, rescaled_patch)
        return cond + update

    return predict_guided


def _with_norms_of(wanted: Array, x: Array, patch: int) -> Array:
    """x `[B, H, W, C]`, each token of patch * patch * C scaled to the norm of the same token of `wanted`."""
    b, h, w, c = x.shape

    def norm(x: Array) -> Array:
        # A network that is still zero has tokens of norm 0.
        return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=(2, 4, 5), keepdims=True), 1e-24))

    wanted, x = (y.reshape(b, h // patch, patch, w // patch, patch, c) for y in (wanted, x))
    return (x * (norm(wanted) / norm(x))).reshape(b, h, w, c)
