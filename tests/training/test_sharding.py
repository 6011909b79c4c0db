"""The mesh and the table of logical-axis rules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dar_jax import models, sharding
from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import init_params, make_state
from tests.training import tiny

KNOWN = {name for name, _ in sharding.RULES}


@pytest.mark.parametrize("query", ["residual", "static", "static_t", "dynamic"])
def test_every_logical_name_has_a_rule(query, monkeypatch):
    """Names of parameters and of activations: linen would leave an unknown one unsharded without a word."""
    config = tiny.make_config()
    config.model.routing.update(kind="residual") if query == "residual" else config.model.routing.update(query=query)
    seen = set()
    constrain = nn.with_logical_constraint
    monkeypatch.setattr(nn, "with_logical_constraint", lambda x, names: seen.update(names) or constrain(x, names))
    boxed = jax.eval_shape(lambda: init_params(models.build(config.model), 0))
    assert {"batch", "tokens"} <= seen
    assert seen - {None} <= KNOWN
    for spec in jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec)):
        assert {name for name in spec if name} <= KNOWN
        assert any(spec), "a parameter without names"


def test_a_name_without_a_rule_is_an_error():
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), jnp.float32), ("embedding",))
    with pytest.raises(ValueError, match="embedding"):
        sharding.tree_shardings(tiny.make_mesh(2, 4), {"w": box})


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (4, 2, (4, 2))])
def test_mesh_fills_all_devices(data, fsdp, shape):
    config = default().mesh
    config.update(data=data, fsdp=fsdp)
    mesh = sharding.make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp")


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 3), (-1, 16), (4, 1), (8, 2)])
def test_mesh_that_does_not_fit_is_an_error(data, fsdp):
    config = default().mesh
    config.update(data=data, fsdp=fsdp)
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(config)


def test_fsdp_must_divide_the_width():
    config = tiny.make_config()
    config.model.update(hidden_size=12)
    optimizer = make_optimizer(config.optimizer, 1)
    with pytest.raises(UserError, match=r"fsdp = 8 must divide 12, an axis of .*params"):
        make_state(config, models.build(config.model), optimizer, tiny.make_mesh(1, 8))


def test_batch_must_divide_over_the_devices():
    mesh = tiny.make_mesh(4, 2)
    sharding.check_batch(mesh, "batch", 16)
    with pytest.raises(UserError, match="batch = 12 must be divisible by the 8 devices"):
        sharding.check_batch(mesh, "batch", 12)
