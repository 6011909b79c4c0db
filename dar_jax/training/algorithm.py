"""The form of a training algorithm. The loop, the checkpoints, the logs and the planner know no more than this."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from dar_jax.objectives.objective import all_trained, nothing


class Algorithm(NamedTuple):
    """How a state goes from step to step. Every entry but `load_frozen` is a pure function.

    A state is a dataclass pytree (flax.struct.PyTreeNode) with the fields `step` (int32, steps taken), `params` (the
    weights under training of the network that is sampled) and `ema` (their moving average, which samples come from).
    It may have any others: of further networks and of their optimizers. All are saved and resumed.

    A step may only depend on its arguments: its randomness follows from the seed and state.step. It returns metrics,
    float32 scalars by name. Those whose name begins with "loss" are shown on the progress line. A metric that is not
    finite means that the step failed; only "param_norm" looks at the new weights, all others at those before.

    Attributes:
      init: key -> the state of step 0, with its logical axes (linen boxes).
      step: (state, frozen, batch) -> (state, metrics). The state is donated.
      sample: (assembled ema, x0, keys, condition) -> x1, as `objectives.Objective.sample`.
      init_frozen: key -> networks that the step uses and does not change, such as a teacher, with their logical axes.
        They are neither donated, saved nor averaged.
      load_frozen: their abstract form, with shardings -> their weights; None if those of `init_frozen` are meant.
      assemble: (`params` or `ema` of a state, frozen) -> what `sample` and the model take, as
        `objectives.Objective.assemble`.
      begin: None, or frozen -> those fields of the state of step 0, by name, that depend on what is frozen.
      forward_passes: of a step for each image, for the count of FLOPs, whatever it recomputes. One with gradients
        counts as three, and as two where the weights are frozen, whose gradients are the third.
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Any, dict], tuple[Any, dict[str, Array]]]
    sample: Callable[[Any, Array, Array, dict], Array]
    init_frozen: Callable[[Array], Any] = nothing
    load_frozen: Callable[[Any], Any] | None = None
    assemble: Callable[[dict, Any], dict] = all_trained
    begin: Callable[[Any], dict[str, Any]] | None = None
    forward_passes: float = 3.0
