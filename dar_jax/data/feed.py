"""Batches on the devices: what each process read, as one sharded batch, encoded to latents where the model asks for it.

A batch is a dictionary with the samples on the leading axis of every array:

    x1          float32 [B, H, W, C]: images in [-1, 1], or normalised latents; all of one bucket, if there are buckets
    condition   what the model is conditioned on (`dar_jax.conditions`)
    image       uint8 [B, S, S, 3]: the images of latents, only if the objective looks at them (`repa.needs_images`)

Further entries are passed on as they are.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files, sharding
from dar_jax.data.buckets import parse_buckets
from dar_jax.data.sources import LATENT_SOURCES
from dar_jax.errors import UserError, require
from dar_jax.objectives.repa import needs_images
from dar_jax.pretrained.vae import load, make_encoder, read_factor

ENCODER_STREAM = 2**32 - 1  # of the seed's random streams; the others are numbered by steps, which never reach it


def encodes_online(config: ConfigDict) -> bool:
    """Whether a model of latents trains on a source of images."""
    return config.model.space == "latents" and config.data.source not in LATENT_SOURCES


def image_size(config: ConfigDict) -> int:
    """Height and width of the images behind x1; of latents whose VAE is not there, what an f8 has encoded."""
    if config.model.space == "pixels" or encodes_online(config):
        return config.data.image_size
    factor = 8
    if config.data.vae and (files.path(config.data.vae) / "vae.json").exists():
        factor = read_factor(config.data.vae, "config.data.vae")
    return factor * config.model.input_size


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of a train step's batch."""
    model, size = config.model, config.train.batch_size
    x1 = jax.ShapeDtypeStruct((size, model.input_size, model.input_size, model.channels), jnp.float32)
    batch, sharded = {"x1": x1, "condition": conditions.build(model).abstract(size)}, sharding.batch_sharding(mesh)
    if needs_images(config):
        side = image_size(config)
        batch["image"] = jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded), batch)


def max_shapes(config: ConfigDict) -> int:
    """How many shapes the batches of a run may have at most; for each the train step compiles once."""
    kind = conditions.build(config.model)
    lengths = kind.lengths if isinstance(kind, conditions.Embeddings) else (0,)
    return len(lengths) * max(len(config.data.buckets), 1)


def describe_shape(batch: dict) -> str:
    """What tells the shapes of a run's batches apart, "64x48x3" or "64x48x16 and 128 tokens"."""
    tokens = batch["condition"]["mask"].shape[1] if "mask" in batch["condition"] else None
    return "x".join(map(str, batch["x1"].shape[1:])) + (f" and {tokens} tokens" if tokens else "")


@contextlib.contextmanager
def open_batches(
    config: ConfigDict,
    mesh: Mesh,
    *,
    batch_size: int,
    first_step: int = 0,
    extra: Callable[[int, np.ndarray], dict[str, np.ndarray]] | None = None,
) -> Iterator[Iterator[dict]]:
    """The batches of `config.data.train_split`, from `first_step` on, without end (`pipeline.train_iterator`).

    Args:
      config: of the run.
      mesh: the devices.
      batch_size: samples of a batch over all devices.
      first_step: how many batches to leave out.
      extra: None, or a function of a step and this process's rows that gives further entries of the batch.

    Raises:
      UserError: the data or the VAE of online encoding do not fit; on entry, before the first batch.
    """
    encode = make_online_encoder(config, mesh) if encodes_online(config) else None
    rows = sharding.local_rows(mesh, batch_size)
    from dar_jax.data.pipeline import train_iterator  # grain, without which a step can be planned and timed

    iterator = train_iterator(
        config.data,
        kind=conditions.build(config.model),
        space="pixels" if encode else config.model.space,
        channels=3 if encode else config.model.channels,
        image_size=image_size(config) if needs_images(config) else None,
        batch_size=batch_size,
        seed=config.seed,
        first_step=first_step,
        rows=rows,
    )

    def batches() -> Iterator[dict]:
        for step, local in enumerate(iterator, start=first_step):
            local = {**local, **extra(step, rows)} if extra else local
            batch = sharding.from_local_rows(mesh, batch_size, rows, local)
            yield {**batch, "x1": encode(batch["x1"], step)} if encode else batch

    with contextlib.closing(iterator):
        yield batches()


def make_online_encoder(config: ConfigDict, mesh: Mesh) -> Callable[[Array, int], Array]:
    """Returns (images float32 [B, H, W, 3] in [-1, 1], step) -> normalised latents float32 [B, h, w, C].

    Each is a draw from its distribution, whose noise follows from config.seed and the step, whatever the mesh.

    Raises:
      UserError: config.data.vae is no VAE, or its latents of these images are not the model's input.
    """
    vae, model, seed = load(config.data.vae, "config.data.vae"), config.model, config.seed
    side = config.data.image_size // vae.model.factor
    if (side, vae.model.latent_channels) != (model.input_size, model.channels):
        raise UserError(
            f"config.data.image_size = {config.data.image_size} makes latents of {side}x{side}x"
            f"{vae.model.latent_channels} in config.data.vae, but config.model takes {model.input_size}x"
            f"{model.input_size}x{model.channels}; set image_size to input_size * {vae.model.factor}."
        )

    @jax.jit
    def draw(moments: Array, step: Array) -> Array:
        stream = jax.random.fold_in(jax.random.key(seed), ENCODER_STREAM)
        mean, std = moments[:, 0], moments[:, 1]
        return vae.normalise(mean + std * jax.random.normal(jax.random.fold_in(stream, step), mean.shape))

    step = vae.model.factor * model.patch_size
    for name, sides in zip(config.data.buckets, parse_buckets(config.data.buckets, "config.data.buckets"), strict=True):
        require(
            not any(side % step for side in sides),
            f'config.data.buckets: the sides of "{name}" must be divisible by {step}, the factor of config.data.vae '
            "times config.model.patch_size.",
        )
    encode = make_encoder(vae, mesh)
    return lambda images, step: draw(encode(images), step)
