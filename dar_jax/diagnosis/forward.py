"""The forward pass opened up: what every sublayer reads, from which sources, with which weights."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dar_jax.conditions import Condition
from dar_jax.models import SiT
from dar_jax.models.mmdit import MMDiT


class Reads(NamedTuple):
    """What the A = 2 * depth + 1 readers of a stack see: sublayers 1..A-1 and then the head.

    Of an MM-DiT they are those of the image stream.

    Sources are at the position of the sublayer that made them, 0 for the embedded input; a chunk's summary is at the
    position of the chunk's last sublayer.

    Attributes:
      states: what each reads, h_1..h_A, `[A, B, T, D]`.
      outputs: v_0 and what each sublayer returns, v_0..v_(A-1), `[A, B, T, D]`.
      weights: of source i for reader l, `[A, A, B, T]` float32, zero where i is none of its sources; None: residual.
    """

    states: Array
    outputs: Array
    weights: Array | None


def forward(
    model: SiT, params: dict, x_t: Array, t: Array, condition: Condition, taps: Array | None = None
) -> tuple[Array, Reads]:
    """Returns the prediction `[B, H, W, C]` of the plain form of a model and the reads behind it.

    Args:
      model, params, x_t, t, condition: as the model takes them.
      taps: None, or zeros `[A, B, T, D]` added to what each reader reads, and to nothing else: the derivative of a
        loss with respect to them says how it hangs on each read.
    """
    variables, scans = {"params": params}, [name for name in ("steps", "skip_steps") if name in params["stack"]]
    if taps is not None:
        is_by_block = model.layout is None or isinstance(model, MMDiT)
        num_steps = model.depth if is_by_block else model.layout.num_steps
        by_step = taps[:-1].reshape(num_steps, -1, *taps.shape[1:])
        parts = jnp.split(by_step, len(scans))  # the halves of long skips are scans of their own
        added = {name: {"added": part} for name, part in zip(scans, parts, strict=True)}
        variables["taps"] = {"stack": {"added": taps[-1:], **added}}
    output, shown = model.clone(plain=True).apply(variables, x_t, t, condition, mutable=["intermediates"])
    stack = shown["intermediates"]["stack"]

    def all_of(name: str, outside_first: bool = False) -> Array:
        by_step, (outside,) = jnp.concatenate([jnp.stack(stack[scan][name], axis=1) for scan in scans]), stack[name]
        inside = by_step.reshape(-1, *outside.shape)
        return jnp.concatenate([outside[None], inside] if outside_first else [inside, outside[None]])

    weights = None if model.layout is None else all_of("weights")
    return output.prediction, Reads(all_of("states"), all_of("outputs", outside_first=True), weights)
