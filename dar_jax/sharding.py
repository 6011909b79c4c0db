"""The device mesh, the table of logical-axis rules, and the shardings of states and batches."""

import contextlib
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax.errors import UserError, require

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or activation -> mesh axis. A name missing here is an error (see `check_names`),
# because linen would leave it unsharded without a word. Between the matrices of a block, that is where sources live
# and are routed, the tensor axis splits the tokens: routing is one token's business.
RULES = (
    ("adapter", ("fsdp", "tensor")),
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("classes", None),
    ("condition", "tensor"),
    ("features", None),
    ("group", "data"),
    ("heads", "tensor"),
    ("hidden", None),
    ("layers", None),
    ("mlp", "tensor"),
    ("modulation", "tensor"),
    ("norm", None),
    ("patch", None),
    ("qkv", None),
    ("query", "tensor"),
    ("rank", None),
    ("skip", None),
    ("tokens", "tensor"),
)


def check(mesh: ConfigDict) -> None:
    """Raises UserError for sizes in `config.mesh` that fit no number of devices."""
    sizes = [mesh[axis] for axis in AXES]
    require(
        all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
        f"config.mesh {', '.join(f'{axis} = {mesh[axis]}' for axis in AXES)}: each must be at least 1, but one of them "
        "may be -1, all the rest.",
    )


def make_mesh(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh of `config.mesh` over `devices`, None for all there are; -1 is the rest.

    The data axis goes across TPU slices, whose network is slow; the other axes stay within one. Raises UserError for
    sizes that do not fill the devices, or a data axis that is no multiple of the slices."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: mesh[axis] for axis in AXES}
    given = {axis: size for axis, size in sizes.items() if size != -1}
    if len(given) == len(AXES) - 1:
        sizes = {axis: given.get(axis, len(devices) // max(1, math.prod(given.values()))) for axis in AXES}
    if math.prod(sizes.values()) != len(devices):
        text = ", ".join(f"{axis} = {mesh[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh {text} does not fill the {len(devices)} devices; set data = -1, and fsdp * tensor to a "
            "divisor."
        )
    slices = _num_slices(devices)
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh.data = {sizes['data']} must be a multiple of the {slices} slices; lower fsdp or tensor."
        )
    shape = sizes["data"] // slices, sizes["fsdp"], sizes["tensor"]
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fit(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Shrinks the mesh of a run to other devices than it had, None for all there are."""
    devices = jax.devices() if devices is None else devices
    per_slice = len(devices) // _num_slices(devices)
    tensor = math.gcd(per_slice if mesh.tensor == -1 else mesh.tensor, per_slice)
    rest = per_slice // tensor
    mesh.update(data=-1, fsdp=math.gcd(rest if mesh.fsdp == -1 else mesh.fsdp, rest), tensor=tensor)


def _num_slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices, 1 elsewhere. GPUs report a slice index per host, but fsdp may go from host to host."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


@contextlib.contextmanager
def use(mesh: Mesh):
    """Makes `mesh` and the rules current, so that linen's logical constraints act."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices but those of one tensor group, which hold the same samples."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh) -> int:
    """Parts into which `batch_sharding` splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Raises UserError unless a batch of `size` splits evenly."""
    if size % batch_shards(mesh):
        raise UserError(
            f"{field} = {size} must be divisible by the {batch_shards(mesh)} devices that split a batch (config.mesh, "
            "data * fsdp)."
        )


def check_model(mesh: Mesh, model: ConfigDict) -> None:
    """Raises UserError unless the heads and the tokens of `config.model` split evenly over the tensor axis."""
    tensor, tokens = mesh.shape["tensor"], (model.input_size // model.patch_size) ** 2
    if model.num_heads % tensor or tokens % tensor:
        raise UserError(
            f"config.mesh.tensor = {tensor} must divide config.model.num_heads = {model.num_heads} and the {tokens} "
            "tokens of a sample."
        )
    if model.family == "mmdit" and model.text_length % tensor:
        raise UserError(
            f"config.mesh.tensor = {tensor} must divide config.model.text_length = {model.text_length}; set that to "
            f"{-(-model.text_length // tensor) * tensor}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch live on the devices of this process, ascending; processes may share some."""
    rows = np.arange(batch_size)
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def from_local_rows(mesh: Mesh, batch_size: int, rows: np.ndarray, local):
    """The sharded batch, a tree of `[batch_size, ...]`, of which this process holds `local`, its `local_rows`."""

    def whole(x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(whole, local)


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


def abstract(mesh: Mesh, make: Callable):
    """Shapes, dtypes and shardings of the (boxed) tree that make() returns: the target of a restore.

    Raises UserError where a size does not divide.
    """
    boxed = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unbox(boxed), tree_shardings(mesh, boxed)
    )


def make(abstract, make: Callable):
    """The tree that make() returns, without boxes, computed on the shardings of its `abstract` form."""
    return jax.jit(lambda: unbox(make()), out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()


def tree_shardings(mesh: Mesh, abstract):
    """Shardings of a tree of (boxed) abstract arrays; raises UserError where a size does not divide."""
    specs = nn.get_partition_spec(abstract)
    check_names(specs)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path, leaf, sharding):
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise UserError(
                    f"config.mesh.{' * '.join(axes)} = {parts} must divide {size}, an axis of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}."
                )

    jax.tree_util.tree_map_with_path(check, unbox(abstract), shardings)
    return shardings
