"""From a config to what runs: the algorithm, its state on the devices and its compiled step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import objectives, sharding
from dar_jax.init_from import load_base, load_teacher, teacher_of
from dar_jax.training import dmd, flow
from dar_jax.training.algorithm import Algorithm
from dar_jax.training.update import skipping_failures


def build_algorithm(config: ConfigDict) -> Algorithm:
    """The algorithm that trains `config`."""
    objective = objectives.build(config, load_base=partial(load_base, config))
    if config.algorithm == "dmd":
        return dmd.build(config, objective, teacher_of(config), partial(load_teacher, config))
    return flow.build(config, objective)


class Setup(NamedTuple):
    """An algorithm on a mesh.

    Attributes:
      algorithm: what runs.
      state, frozen: shapes, dtypes and shardings of its state and of its frozen networks.
      step: its jitted step, which skips failures if `config.train.max_skipped` says so.
      init: makes the state of step 0.
      begin: None, or what the algorithm has of that name, jitted.
      load_frozen: makes or reads the frozen networks.
    """

    algorithm: Algorithm
    state: Any
    frozen: Any
    step: Callable
    init: Callable[[], Any]
    begin: Callable[[Any], dict[str, Any]] | None
    load_frozen: Callable[[], Any]


def set_up(config: ConfigDict, algorithm: Algorithm, mesh: Mesh) -> Setup:
    """Raises UserError if an array of the state does not divide over the mesh."""

    def init():
        return algorithm.init(jax.random.key(config.seed))

    def init_frozen():
        return algorithm.init_frozen(jax.random.key(config.seed))

    state, frozen = sharding.abstract(mesh, init), sharding.abstract(mesh, init_frozen)
    load, begin = algorithm.load_frozen, algorithm.begin
    if begin:
        fields = {name: getattr(state, name) for name in jax.eval_shape(begin, frozen)}
        begin = jax.jit(begin, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, fields))
    return Setup(
        algorithm,
        state,
        frozen,
        jax.jit(skipping_failures(algorithm.step) if config.train.max_skipped else algorithm.step, donate_argnums=0),
        lambda: sharding.make(state, init),
        begin,
        lambda: load(frozen) if load else sharding.make(frozen, init_frozen),
    )
