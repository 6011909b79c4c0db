"""Representation alignment (REPA, Yu et al. 2024, arXiv:2410.06940): a state of the model is drawn to features of x1.

The state is what enters block k + 1, before its norm. A projector of its own maps it to the target's width:

    loss = loss of the model + coefficient * mean over samples and tokens of error(projector(state), target)

with error = -cos in float32. The targets are the patch features of a frozen encoder, as in REPA, or need no encoder:
histograms of oriented gradients; the clean x1 itself, whose error is smooth L1 (SRA 2, arXiv:2601.17830); or the state
behind a later block, without gradient and without projector (LayerSync).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import sharding
from dar_jax.errors import UserError, check_choice, require
from dar_jax.models import layers, numerics
from dar_jax.objectives.hog import WIDTH, hog, neighbourhood
from dar_jax.objectives.objective import HiddenTerm, nothing
from dar_jax.pretrained import dino, dino_weights

NAME = "repa"  # of the projector among the parameters, and of the metrics
PROJECTOR_WIDTH = 2048


class Mlp(nn.Module):
    """REPA's projector: three linear layers with SiLU between them, `[B, T, D]` -> `[B, T, width]`."""

    width: int
    grid: int
    arithmetic: numerics.Arithmetic

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = layers.Dense((PROJECTOR_WIDTH,), ("embed", "mlp"), self.arithmetic, name="dense_0")(x)
        x = layers.Dense((PROJECTOR_WIDTH,), ("mlp", "embed"), self.arithmetic, name="dense_1")(nn.silu(x))
        return layers.Dense((self.width,), ("embed", "features"), self.arithmetic, name="dense_2")(nn.silu(x))


class Conv(nn.Module):
    """A 3x3 convolution of the grid of tokens, padded with zeros (iREPA, arXiv:2512.10794), initialised as PyTorch's.

    `[B, grid * grid, D]` -> `[B, grid * grid, width]`. It is computed as a matmul, because the gradient of XLA's
    convolution comes out wrong, by a whole factor, where a mesh splits both samples and tokens.
    """

    width: int
    grid: int
    arithmetic: numerics.Arithmetic

    @nn.compact
    def __call__(self, x: Array) -> Array:
        around = neighbourhood(x.reshape(len(x), self.grid, self.grid, -1)).reshape(*x.shape[:2], -1)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return layers.Dense((self.width,), ("embed", "features"), self.arithmetic, init, name="dense")(around)


PROJECTORS = {"mlp": Mlp, "conv": Conv}


def negative_cosine(projected: Array, target: Array) -> Array:
    """-cos of the angle between vectors `[..., F]` -> `[...]`, 0 where one is zero."""
    return -jnp.sum(_unit(projected) * _unit(target), axis=-1)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def smooth_l1(projected: Array, target: Array) -> Array:
    """d^2 / 2 where |d| < 1, else |d| - 1/2, mean over the features: `[..., F]` twice -> `[...]`."""
    distance = jnp.abs(projected - target)
    return jnp.mean(jnp.where(distance < 1, 0.5 * jnp.square(distance), distance - 0.5), axis=-1)


class Target(NamedTuple):
    """What the projected state is compared with.

    Attributes:
      width: F, of a feature; None if it is a state of the model, which needs no projector.
      features: (frozen networks, batch) -> `[B, T, F]`, float32; None if it is a state of the model.
      error: of projected states and targets, per token.
      init_frozen, load_frozen: of the networks that `features` needs.
    """

    width: int | None
    features: Callable[[Any, dict], Array] | None
    error: Callable[[Array, Array], Array] = negative_cosine
    init_frozen: Callable[[Array], Any] = nothing
    load_frozen: Callable[[Any], Any] | None = None


def _encoder(config: ConfigDict, grid: int) -> Target:
    settings = config.repa
    network = dino.Dino(**dino.SIZES[settings.encoder], dtype=jnp.dtype(settings.dtype))

    def features(frozen, batch):
        images = _images(batch)
        rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
        return dino.features(network, frozen, rgb, grid)

    def load(abstract):
        check_files(config)
        return dino_weights.load_params(settings.weights, "config.repa.weights", abstract)

    return Target(network.hidden_size, features, init_frozen=lambda key: dino.initial(network), load_frozen=load)


def _hog(config: ConfigDict, grid: int) -> Target:
    return Target(WIDTH, lambda frozen, batch: hog(_images(batch), grid))


def _latents(config: ConfigDict, grid: int) -> Target:
    model = config.model
    return Target(
        model.patch_size**2 * model.channels,
        lambda frozen, batch: layers.patchify(batch["x1"], model.patch_size),
        smooth_l1,
    )


def _later_block(config: ConfigDict, grid: int) -> Target:
    return Target(None, None)


TARGETS = {"encoder": _encoder, "hog": _hog, "latents": _latents, "later_block": _later_block}


def _images(batch: dict) -> Array:
    """The images of a batch, float32 `[B, S, S, C]` in [-1, 1]."""
    return batch["image"].astype(jnp.float32) / 127.5 - 1 if "image" in batch else batch["x1"]


def needs_images(config: ConfigDict) -> bool:
    """Whether a batch of the run must hold the images of its latents, uint8 `[B, S, S, 3]`, as "image"."""
    return config.repa.target in ("encoder", "hog") and config.model.space == "latents"


def make_features(config: ConfigDict, mesh: Mesh) -> Callable[[dict], Array] | None:
    """Returns batch -> the features `[B, T, F]` that a state of the model is aligned with.

    None if there is no alignment, or one with a state of the model. Raises UserError as `check_files`.
    """
    target = TARGETS.get(config.repa.target, _later_block)(config, config.model.input_size // config.model.patch_size)
    if target.features is None:
        return None
    abstract = sharding.abstract(mesh, lambda: target.init_frozen(jax.random.key(0)))
    frozen, features = target.load_frozen(abstract) if target.load_frozen else (), jax.jit(target.features)
    return lambda batch: features(frozen, batch)


def build(config: ConfigDict, model: nn.Module) -> HiddenTerm:
    """The term of `config.repa` for `model`, whose grid and width it takes. Reads no file before `load_frozen`."""
    settings, grid = config.repa, model.input_size // model.patch_size
    target = TARGETS[settings.target](config, grid)
    arithmetic = numerics.Arithmetic.of(model.dtype, plain=model.plain)
    projector = PROJECTORS[settings.projector](target.width, grid, arithmetic) if target.features else None

    def init(key: Array) -> dict:
        return projector.init(key, jnp.zeros((1, grid**2, model.hidden_size)))["params"] if projector else {}

    def draw(step: Array, frozen, batch: dict) -> dict:
        x1 = batch["x1"]
        is_on = jnp.logical_or(settings.stop_step == 0, step < settings.stop_step)
        drawn = {"weight": jnp.broadcast_to(jnp.where(is_on, settings.coefficient, 0.0), x1.shape[:1])}
        if target.features is None:
            return drawn

        def features():
            return target.features(frozen, batch)

        def off():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(features))

        return {**drawn, "target": jax.lax.cond(is_on, features, off) if settings.stop_step else features()}

    def loss(params: dict, states: tuple[Array, ...], drawn: dict) -> tuple[Array, dict]:
        projected = projector.apply({"params": params}, states[0]) if projector else states[0]
        goal = drawn["target"] if projector else jax.lax.stop_gradient(states[1])
        projected, goal = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (projected, goal))
        if settings.standardize:
            goal = standardized(goal, settings.mean_share)
        error = jnp.mean(target.error(projected, goal), axis=-1)  # [B]
        cosine = -jnp.mean(negative_cosine(projected, goal))
        return jnp.mean(drawn["weight"] * error), {f"loss_{NAME}": jnp.mean(error), f"cosine_{NAME}": cosine}

    blocks = (settings.block,) if target.features else (settings.block, settings.later_block)
    return HiddenTerm(NAME, blocks, init, draw, loss, target.init_frozen, target.load_frozen)


def standardized(features: Array, mean_share: float) -> Array:
    """(f - mean_share * mean) / (std + 1e-6) over the tokens of `[B, T, F]`, with the unbiased std (iREPA)."""
    mean, std = jnp.mean(features, axis=1, keepdims=True), jnp.std(features, axis=1, ddof=1, keepdims=True)
    return (features - mean_share * mean) / (std + 1e-6)


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of `config.repa` that cannot work with the model and data of `config`."""
    settings, model, data = config.repa, config.model, config.data
    check_choice("config.repa.target", settings.target, ("none", *TARGETS))
    check_choice("config.repa.projector", settings.projector, PROJECTORS)
    check_choice("config.repa.encoder", settings.encoder, dino.SIZES)
    check_choice("config.repa.dtype", settings.dtype, ("float32", "bfloat16"))
    if settings.target == "none":
        return
    last = model.depth - 1
    require(
        settings.block <= last,
        f"config.repa.block = {settings.block} must be in 1 to {last}, below config.model.depth = {model.depth}.",
    )
    require(
        settings.target != "later_block" or settings.block < settings.later_block <= last,
        f"config.repa.later_block = {settings.later_block} must be in config.repa.block + 1 = {settings.block + 1} to "
        f"{last}, below config.model.depth = {model.depth}.",
    )
    require(
        not needs_images(config) or data.source != "synthetic",
        f'config.repa.target = {settings.target} needs images, which config.data.source = "synthetic" does not have; '
        "take latents or later_block.",
    )
    grid = model.input_size // model.patch_size
    require(
        not settings.standardize or grid > 1,
        "config.repa.standardize needs several tokens, but the model has one; lower config.model.patch_size.",
    )


def check_files(config: ConfigDict) -> None:
    """Raises UserError unless `config.repa.weights`, if they are needed, are those of `config.repa.encoder`."""
    settings = config.repa
    if settings.target != "encoder":
        return
    if not settings.weights:
        raise UserError(
            'config.repa.weights = "" must name the encoder: a directory that python -m dar_jax.convert '
            f"--kind={settings.encoder.partition('_')[0]} has made."
        )
    header, sizes = dino_weights.read_header(settings.weights, "config.repa.weights"), dino.SIZES[settings.encoder]
    for name, size in sizes.items():
        if header[name] != size:
            raise UserError(
                f'config.repa.weights = "{settings.weights}" has {name} = {header[name]}, but config.repa.encoder = '
                f"{settings.encoder} has {size}; make them suit each other."
            )
