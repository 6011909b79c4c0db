"""What a run carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import sharding
from dar_jax.models import SiT


class TrainState(flax.struct.PyTreeNode):
    """Attributes:
    step: optimizer steps taken, int32.
    params: float32 master weights.
    ema: their exponential moving average, the weights that samples come from.
    opt_state: of optax.
    """

    step: Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def init_params(model: SiT, seed: int):
    """Initial parameters with their logical axes (linen boxes); they depend on the seed only."""
    x = jnp.zeros((1, model.input_size, model.input_size, model.channels))
    return model.init(jax.random.key(seed), x, jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)})["params"]


def abstract_params(config: ConfigDict, model: SiT, mesh: Mesh):
    """Shapes, dtypes and shardings of the parameters: the target of a restore."""
    return _place(mesh, jax.eval_shape(lambda: init_params(model, config.seed)))


def _place(mesh: Mesh, boxed):
    """Abstract boxed arrays -> unboxed ones with their shardings."""
    shardings = sharding.tree_shardings(mesh, boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), sharding.unbox(boxed), shardings
    )


def make_state(config: ConfigDict, model: SiT, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Returns (a function that makes the initial sharded state, its abstract form with shardings)."""

    def init() -> TrainState:
        params = init_params(model, config.seed)
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params))

    abstract = _place(mesh, jax.eval_shape(init))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: sharding.unbox(init()), out_shardings=shardings), abstract
