"""The device mesh, the table of logical-axis rules, and the shardings of states and batches."""

import contextlib
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax.errors import UserError

# Logical axis of a parameter or activation -> mesh axis. A name missing here is an error (see `check_names`),
# because linen would leave it unsharded without a word.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("classes", None),
    ("condition", None),
    ("features", None),
    ("heads", None),
    ("hidden", None),
    ("layers", None),
    ("mlp", None),
    ("norm", None),
    ("patch", None),
    ("qkv", None),
    ("query", None),
    ("tokens", None),
)


def make_mesh(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp) mesh of `config.mesh` over `devices`, None for all here; -1 is the rest.

    Raises UserError if it cannot be."""
    devices = jax.devices() if devices is None else devices
    data = len(devices) // mesh.fsdp if mesh.data == -1 else mesh.data
    if data * mesh.fsdp != len(devices):
        raise UserError(
            f"config.mesh data = {mesh.data}, fsdp = {mesh.fsdp} does not fill the {len(devices)} devices; "
            "set data = -1 and fsdp to a divisor."
        )
    return jax.make_mesh((data, mesh.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh):
    """Makes `mesh` and the rules current, so that linen's logical constraints act."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Raises UserError unless a batch of `size` splits evenly over the devices."""
    if size % mesh.size:
        raise UserError(f"{field} = {size} must be divisible by the {mesh.size} devices.")


def check_names(specs) -> None:
    """Raises ValueError for a logical axis name that has no rule."""
    known = {name for name, _ in RULES}
    for spec in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)):
        unknown = {name for name in spec if name is not None} - known
        if unknown:
            raise ValueError(f"logical axes {sorted(unknown)} have no rule in dar_jax/sharding.py")


def unbox(tree):
    """Strips linen's boxes of logical names. (`nn.unbox` would also constrain abstract or eager values.)"""
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def tree_shardings(mesh: Mesh, abstract):
    """Shardings of a tree of (boxed) abstract arrays; raises UserError where a size does not divide."""
    specs = nn.get_partition_spec(abstract)
    check_names(specs)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path, leaf, sharding):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            if axis == "fsdp" and size % mesh.shape["fsdp"]:
                raise UserError(
                    f"config.mesh.fsdp = {mesh.shape['fsdp']} must divide {size}, an axis of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}."
                )

    jax.tree_util.tree_map_with_path(check, unbox(abstract), shardings)
    return shardings
