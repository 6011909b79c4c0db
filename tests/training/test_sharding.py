"""The mesh and the table of logical-axis rules."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dar_jax import sharding
from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.training.setup import build_algorithm, set_up
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
    boxed = jax.eval_shape(lambda: tiny.initial(config))
    assert {"batch", "tokens"} <= seen
    assert seen - {None} <= KNOWN
    for spec in jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec)):
        assert {name for name in spec if name} <= KNOWN
        assert any(spec), "a parameter without names"


def test_a_name_without_a_rule_is_an_error():
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), jnp.float32), ("embedding",))
    with pytest.raises(ValueError, match="embedding"):
        sharding.tree_shardings(tiny.make_mesh(2, 4), {"w": box})


SIZES = {(-1, 1, 1): (8, 1, 1), (-1, 4, 1): (2, 4, 1), (4, 2, 1): (4, 2, 1), (2, -1, 2): (2, 2, 2)}


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_fills_all_devices(sizes):
    config = default().mesh
    config.update(dict(zip(sharding.AXES, sizes, strict=True)))
    mesh = sharding.make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == SIZES[sizes]


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (-1, 16, 1), (4, 1, 1), (8, 2, 1), (-1, -1, 1), (2, 0, -1), (-1, 2, 3)])
def test_mesh_that_does_not_fit_is_an_error(sizes):
    config = default().mesh
    config.update(dict(zip(sharding.AXES, sizes, strict=True)))
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(config)


def test_slices_are_along_the_data_axis():
    """Two slices of four devices: a group of fsdp or tensor never crosses from one to the other."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        coords: tuple[int, int, int]
        core_on_chip: int = 0
        process_index: int = 0
        platform: str = "tpu"
        device_kind: str = "TPU v5 lite"

    devices = [Device(i, i % 2, (i // 2 % 2, i // 4, 0)) for i in range(8)]
    config = default().mesh
    config.update(data=-1, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(config, devices)
    assert mesh.devices.shape == (2, 2, 2)
    assert [{d.slice_index for d in group.flat} for group in mesh.devices] == [{0}, {1}]
    config.update(data=1, fsdp=8, tensor=1)
    sharding.fit(config, devices)
    assert (config.data, config.fsdp, config.tensor) == (-1, 4, 1)
    config.update(data=1, fsdp=4, tensor=2)
    with pytest.raises(UserError, match=r"data = 1 must be a multiple of the 2 slices"):
        sharding.make_mesh(config, devices)


@pytest.mark.parametrize(("shape", "rows"), [((4, 2, 1), 16), ((2, 2, 2), 16), ((1, 1, 8), 4)])
def test_a_batch_is_put_together_from_local_rows(shape, rows):
    mesh = tiny.make_mesh(*shape)
    local = sharding.local_rows(mesh, rows)
    np.testing.assert_array_equal(local, np.arange(rows))  # one process has them all
    batch = sharding.from_local_rows(mesh, rows, local, np.arange(3 * rows).reshape(rows, 3))
    np.testing.assert_array_equal(batch, np.arange(3 * rows).reshape(rows, 3))
    assert batch.sharding == sharding.batch_sharding(mesh)


@pytest.mark.parametrize(("field", "value"), [("num_heads", 1), ("patch_size", 8)])
def test_tensor_axis_must_divide_heads_and_tokens(field, value):
    config = tiny.make_config()
    sharding.check_model(tiny.make_mesh(2, 2, 2), config.model)
    config.model[field] = value
    with pytest.raises(UserError, match=r"tensor = 2 must divide config.model.num_heads"):
        sharding.check_model(tiny.make_mesh(2, 2, 2), config.model)


@pytest.mark.parametrize(("sizes", "devices", "expected"), [
    ((-1, 8, 1), 4, (4, 1)), ((2, 4, 2), 2, (1, 2)), ((-1, -1, 1), 8, (8, 1)), ((1, 2, 4), 8, (2, 4))
])  # fmt: skip
def test_the_mesh_of_a_run_fits_fewer_devices(sizes, devices, expected):
    config = default().mesh
    config.update(dict(zip(sharding.AXES, sizes, strict=True)))
    sharding.fit(config, jax.devices()[:devices])
    assert (config.fsdp, config.tensor) == expected
    sharding.make_mesh(config, jax.devices()[:devices])


def test_fsdp_must_divide_the_width():
    config = tiny.make_config()
    config.model.update(hidden_size=12)
    with pytest.raises(UserError, match=r"fsdp = 8 must divide 12, an axis of .*params"):
        set_up(config, build_algorithm(config), tiny.make_mesh(1, 8))


def test_batch_must_divide_over_the_devices():
    mesh = tiny.make_mesh(4, 2)
    sharding.check_batch(mesh, "batch", 16)
    with pytest.raises(UserError, match="batch = 12 must be divisible by the 8 devices"):
        sharding.check_batch(mesh, "batch", 12)
