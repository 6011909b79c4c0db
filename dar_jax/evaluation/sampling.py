"""Samples from a model on all devices: sample i depends on the seed and i alone, not on its batch."""

import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import models, sharding
from dar_jax.config import validate
from dar_jax.diffusion import guidance, sampler
from dar_jax.errors import UserError
from dar_jax.evaluation.grid import save_grid
from dar_jax.models import SiT
from dar_jax.pretrained.vae import AutoencoderKL, make_decoder, read_header
from dar_jax.pretrained.vae import load as load_vae
from dar_jax.training.checkpoint import restore_ema
from dar_jax.training.state import abstract_params


def make_sampler(config: ConfigDict, model: SiT, mesh: Mesh) -> Callable[[dict, Array, Array], Array]:
    """Returns a function (params, index int32 [B], label int32 [B]) -> images float32 [B, H, W, C].

    Its batch is split by `sharding.batch_sharding`. The noise of sample i follows from (config.seed, i). The VAE of
    `config.data.vae` decodes latents; without it they are what is returned.

    Raises:
      UserError: there is no VAE there, or its latents are not the model's.
    """

    def draw(params: dict, index: Array, label: Array) -> Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(index)
        noise_keys, sde_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        shape = (model.input_size, model.input_size, model.channels)
        x0 = jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys)

        def predict(x, t, y):
            return model.apply({"params": params}, x, t, {"label": y}).prediction

        predict_guided = guidance.guided(
            predict,
            label,
            model.num_classes,
            scale=config.sampler.cfg_scale,
            channels=config.sampler.cfg_channels,
            interval=config.sampler.cfg_interval,
        )
        return sampler.sample(predict_guided, x0, sde_keys, config.sampler, config.diffusion)

    batch = sharding.batch_sharding(mesh)
    draw = jax.jit(draw, in_shardings=(None, batch, batch), out_shardings=batch)
    if not config.data.vae:
        return draw
    vae = load_vae(config.data.vae, "config.data.vae")
    if vae.model.latent_channels != model.channels:
        raise UserError(
            f'config.data.vae = "{config.data.vae}" decodes {vae.model.latent_channels} channels, but '
            f"config.model.channels = {model.channels}; name another VAE, or none for a model of pixels."
        )
    decode = make_decoder(vae, mesh)
    return lambda params, index, label: decode(draw(params, index, label))


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """[H, W, C] of what `make_sampler` draws. Raises UserError if there is no VAE in `config.data.vae`."""
    side = config.model.input_size
    if not config.data.vae:
        return side, side, config.model.channels
    header = read_header(config.data.vae, "config.data.vae")
    side *= AutoencoderKL(tuple(header["channels"]), header["latent_channels"]).factor
    return side, side, 3


def class_labels(config: ConfigDict, count: int) -> np.ndarray:
    """Labels int32 [count] of samples 0, 1, ... by `config.eval.labels`; a longer list begins with the shorter one.

    balanced: sample i is of class i % num_classes. random: uniform draws, which follow from `config.seed`.
    """
    if config.eval.labels == "balanced":
        return np.arange(count, dtype=np.int32) % config.model.num_classes
    # Doubles, one from each step of the generator, so that the list does not depend on its length.
    draws = np.random.default_rng(config.seed).random(count)
    return (draws * config.model.num_classes).astype(np.int32)


def sample_images(
    draw: Callable,
    params: dict,
    labels: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    *,
    first: int = 0,
    as_uint8: bool = True,
) -> Iterator[np.ndarray]:
    """Yields samples first, first + 1, ... of `labels` in batches [b, H, W, C]: uint8, or float32 as drawn.

    Every process gets all images. Batches are of batch_size, or a few more that the devices can share evenly; the
    last is filled up, so that one program serves all.

    Raises:
      UserError: a sample holds NaN or infinity, which uint8 would hide.
    """
    sharded, parts = sharding.batch_sharding(mesh), sharding.batch_shards(mesh)
    batch_size = parts * -(-batch_size // parts)
    for start in range(first, len(labels), batch_size):
        label = np.asarray(labels[start : start + batch_size], np.int32)
        count = len(label)
        label = np.pad(label, (0, batch_size - count), mode="edge")
        index = np.arange(batch_size, dtype=np.int32) + start
        images = draw(params, jax.device_put(index, sharded), jax.device_put(label, sharded))
        if not bool(_all_finite(images)):
            raise UserError(
                f"samples {start} to {start + count - 1} hold NaN or infinity: the weights are broken, or the sampler "
                "divides by zero; try --sampler=heun or an earlier --step."
            )
        images = to_uint8(images) if as_uint8 else images
        yield np.asarray(multihost_utils.process_allgather(images, tiled=True))[:count]


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


@jax.jit
def to_uint8(x: Array) -> Array:
    """[-1, 1] -> uint8, clamp(127.5 x + 128) as the official samplers write it."""
    return jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)


def sample_to_file(
    config: ConfigDict, workdir: str, step: int | None, labels: list[str] | None, num_per_label: int, out: str
) -> None:
    """Draws `num_per_label` samples of each label from a run's EMA and writes them to `out`.

    A .png is a grid with a column per label; an .npz is in the ADM layout, or holds float32 latents as they are. Of
    several processes the first writes.
    Raises UserError for a label, file type or checkpoint that does not exist.
    """
    num_classes = config.model.num_classes
    path = pathlib.Path(out)
    if path.suffix not in (".png", ".npz"):
        raise UserError(f'--out = "{out}" must end in .png or .npz.')
    is_image = config.model.channels in (1, 3) or bool(config.data.vae)
    if path.suffix == ".png" and not is_image:
        raise UserError(
            f'--out = "{out}": the model makes latents of {config.model.channels} channels; name their VAE '
            "with --vae, or write an .npz."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out = "{out}" cannot be written: {error.strerror}; take another.') from error
    labels = [str(i) for i in range(min(num_classes, 10))] if labels is None else labels
    if not labels:
        raise UserError("--labels is empty; name classes, as in --labels=0,1,2.")
    for label in labels:
        if not label.isdecimal() or int(label) >= num_classes:
            raise UserError(f"--labels: {label} is no class; the model has classes 0 to {num_classes - 1}.")
    sharding.fit(config.mesh)
    validate(config)
    sampler.check(config.sampler)
    mesh = sharding.make_mesh(config.mesh)
    model = models.build(config.model)
    with sharding.use(mesh):
        ema, _ = restore_ema(workdir, abstract_params(config, model, mesh), step)
        columns = np.tile(np.asarray(labels, np.int32), num_per_label)
        draw = make_sampler(config, model, mesh)
        batches = sample_images(draw, ema, columns, config.eval.batch_size, mesh, as_uint8=is_image)
        images = np.concatenate(list(batches))
    if jax.process_index() > 0:
        return
    if path.suffix == ".png":
        save_grid(path, images, columns=len(labels))
    else:
        np.savez(path, images, columns.astype(np.int64))
