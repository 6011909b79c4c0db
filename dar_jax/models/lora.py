"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as functions of parameter trees.

A linear map x W + b with W `[I, *O]` becomes x W + b + s (x A) B. A is `[I, r]`, B is `[r, *O]`, and the scale s is
alpha / r. The layer `layers.Dense` finds A, B and s beside its kernel, as the leaves "lora_a", "lora_b" and
"lora_scale". Where a scan stacks the kernels of its steps on a leading axis, it stacks these leaves too.

There are two trees for one model. The base holds what is frozen. The trained tree holds A, B and the parameters of the
aggregators of routing. `assemble` puts one tree of each into the parameters of the model. One base may serve several
trained trees, and a residual model by itself.
"""

import re
import zlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from dar_jax.errors import UserError

# The linear layers of attention and MLP, in a SiT and in both streams of an MM-DiT, without the modulation.
TARGETS = (r"stack/.*/(qkv|q|k|v|out|mlp/dense_[01])/kernel",)
_ROUTING = re.compile(r"(.*/)?\w*query\w*/.*|stack/(steps/gate_\d+|final_gate)")


def _flat(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def _nested(leaves: dict) -> dict:
    return traverse_util.unflatten_dict(leaves, sep="/")


def init(key: Array, params: dict, rank: int, targets: Sequence[str] = ()) -> dict:
    """Fresh A and B, float32 with their logical axes: A is uniform in +-1 / sqrt(I), as in peft, and B is zero.

    Args:
      key: of A.
      params: of the model in linen's boxes, or their abstract form.
      rank: r.
      targets: regular expressions of whole paths of kernels, as "stack/steps/block_0/image/q/kernel"; none: `TARGETS`.

    Raises:
      UserError: an expression matches no kernel.
    """
    kernels = {path: leaf for path, leaf in _flat(split(params)[1]).items() if path.rpartition("/")[2] == "kernel"}
    leaves = {}
    for target in targets or TARGETS:
        found = [path for path in kernels if re.fullmatch(target, path)]
        if not found:
            raise UserError(f'config.lora.targets: no kernel is called "{target}"; kernels are like {min(kernels)}.')
        for path in found:
            names, shape = kernels[path].names, kernels[path].value.shape
            num_stacked = int(names[0] == "layers")
            stacked, (size, *outputs) = shape[:num_stacked], shape[num_stacked:]
            layer, path_key = path.removesuffix("kernel"), jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound = size**-0.5
            a = jax.random.uniform(path_key, (*stacked, size, rank), minval=-bound, maxval=bound)
            b = jnp.zeros((*stacked, rank, *outputs))
            # Each has one wide axis, which is split over all devices that share a copy of the weights.
            a_names = *names[:num_stacked], "adapter", "rank"
            b_names = *names[:num_stacked], "rank", *names[num_stacked + 1 : -1], "adapter"
            leaves[f"{layer}lora_a"] = nn.LogicallyPartitioned(a, a_names)
            leaves[f"{layer}lora_b"] = nn.LogicallyPartitioned(b, b_names)
    return _nested(leaves)


def split(params: dict) -> tuple[dict, dict]:
    """Parameters without adapters -> those of aggregators, which are trained beside adapters, and all others."""
    routing, base = {}, {}
    for path, leaf in _flat(params).items():
        (routing if _ROUTING.fullmatch(path) else base)[path] = leaf
    return _nested(routing), _nested(base)


def union(*trees: dict) -> dict:
    """One tree with the leaves of all; where several have one, that of the last."""
    leaves = {}
    for tree in trees:
        leaves |= _flat(tree)
    return _nested(leaves)


def assemble(base: dict, trained: dict, scale: float) -> dict:
    """The parameters of a model of which `base` and `trained` are parts, with s = `scale`. Copies nothing."""
    trained = _flat(trained)
    scales = {
        f"{path.removesuffix('lora_a')}lora_scale": np.full(leaf.shape[:-2], scale, np.float32)
        for path, leaf in trained.items()
        if path.endswith("/lora_a")
    }
    return union(base, _nested(trained | scales))


def merge(params: dict) -> dict:
    """Assembled parameters -> those without adapters of the same function: every kernel becomes W + s A B.

    The sum is made in float32, or in float64, and has the type of the kernel.
    """
    leaves = _flat(params)
    merged = {path: leaf for path, leaf in leaves.items() if not path.rpartition("/")[2].startswith("lora_")}
    for path in leaves:
        if path.endswith("/lora_a"):
            layer = path.removesuffix("lora_a")
            a, b, scale = (jnp.asarray(leaves[f"{layer}lora_{name}"]) for name in ("a", "b", "scale"))
            kernel = merged[f"{layer}kernel"]
            change = scale[..., None, None] * (a @ b.reshape(*b.shape[: a.ndim - 1], -1))
            merged[f"{layer}kernel"] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
    return _nested(merged)
