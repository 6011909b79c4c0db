"""The form of an objective, and of a term that is added to one."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array


def nothing(key: Array) -> Any:
    """No networks."""
    return ()


def all_trained(trained: dict, frozen: Any) -> dict:
    """The parameters of a model none of whose weights are frozen."""
    return trained


class Objective(NamedTuple):
    """What is minimised, and how its model is sampled. Every entry but `load_frozen` is a pure function.

    What is trained may be a part of the parameters, and the rest be frozen: `assemble` puts both together.

    Attributes:
      init: key -> initial values of what is trained, with their logical axes (linen boxes): a dictionary.
      draw: (key, step, frozen, batch) -> the batch with all that is random in a loss: noises, times, dropped
        conditions; and with what the frozen networks make of it. The samples stay on the leading axis of every array,
        so that the result can be cut into microbatches.
      loss: (params, drawn batch) -> (mean loss, float32 scalar; further metrics, scalars by name).
      sample: (params, x0 `[B, H, W, C]` N(0, 1), keys `[B]`, condition) -> x1 `[B, H, W, C]` float32.
      helpers: entries of the parameters that only the loss needs. They are trained, but neither averaged nor sampled.
      init_frozen, load_frozen: networks that are not trained, as those of `training.algorithm.Algorithm`.
      assemble: (what is trained, frozen) -> the parameters that `loss`, `sample` and the model take. It copies no
        array, so it may be called outside of jit.
    """

    init: Callable[[Array], dict]
    draw: Callable[[Array, Array, Any, dict], dict]
    loss: Callable[[dict, dict], tuple[Array, dict[str, Array]]]
    sample: Callable[[dict, Array, Array, dict], Array]
    helpers: tuple[str, ...] = ()
    init_frozen: Callable[[Array], Any] = nothing
    load_frozen: Callable[[Any], Any] | None = None
    assemble: Callable[[dict, Any], dict] = all_trained

    def sampled(self, params: dict) -> dict:
        """The parameters that `sample` needs, of all or of those that are trained."""
        return {name: value for name, value in params.items() if name not in self.helpers}

    def init_sampled(self, key: Array) -> dict:
        """Initial parameters without those that only the loss needs."""
        return self.sampled(self.init(key))


class HiddenTerm(NamedTuple):
    """A term of a loss that looks at states within the model.

    Attributes:
      name: of its parameters among those of the model, and of its metrics.
      blocks: the states it looks at, as `hidden_at` of a model.
      init: key -> its own parameters, with their logical axes; {} if it has none.
      draw: (step, frozen, batch) -> what it compares the states with: arrays, samples on the leading axis.
      loss: (its parameters, states, drawn) -> (weighted mean, float32 scalar; metrics, scalars by name).
      init_frozen, load_frozen: networks that are not trained, as those of `Objective`.
    """

    name: str
    blocks: tuple[int, ...]
    init: Callable[[Array], dict]
    draw: Callable[[Array, Any, dict], dict]
    loss: Callable[[dict, tuple[Array, ...], dict], tuple[Array, dict[str, Array]]]
    init_frozen: Callable[[Array], Any] = nothing
    load_frozen: Callable[[Any], Any] | None = None
