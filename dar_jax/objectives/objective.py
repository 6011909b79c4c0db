"""The form of an objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array


class Objective(NamedTuple):
    """What is minimised, and how its model is sampled. Every entry is a pure function.

    Attributes:
      init: key -> initial parameters, with their logical axes (linen boxes).
      draw: (key, batch) -> the batch with all that is random in a loss: noises, times, dropped conditions. The samples
        stay on the leading axis of every array, so that the result can be cut into microbatches.
      loss: (params, drawn batch) -> (mean loss, float32 scalar; further metrics, scalars by name).
      sample: (params, x0 `[B, H, W, C]` N(0, 1), keys `[B]`, condition) -> x1 `[B, H, W, C]` float32.
    """

    init: Callable[[Array], Any]
    draw: Callable[[Array, dict], dict]
    loss: Callable[[Any, dict], tuple[Array, dict[str, Array]]]
    sample: Callable[[Any, Array, Array, dict], Array]
