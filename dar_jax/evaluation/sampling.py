"""Samples from a model on all devices: sample i depends on the seed and i alone, not on its batch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files, hosts, objectives, sharding
from dar_jax.checkpoint import restore_ema, saved_steps
from dar_jax.data.captions import of_prompts
from dar_jax.errors import UserError
from dar_jax.evaluation.grid import save_grid
from dar_jax.init_from import load_base
from dar_jax.pretrained.vae import load as load_vae
from dar_jax.pretrained.vae import make_decoder, read_factor


def make_sampler(config: ConfigDict, sample: Callable, mesh: Mesh) -> Callable[[Any, Array, dict], Array]:
    """Returns a function (params, index int32 [B], condition of B samples) -> images float32 [B, H, W, C].

    Its batch is split by `sharding.batch_sharding`. The noise of sample i follows from (config.seed, i). The VAE of
    `config.data.vae` decodes latents; without it they are what is returned.

    Args:
      config: of the run.
      sample: (params, x0, keys, condition) -> x1, as `objectives.Objective.sample`.
      mesh: the devices.

    Raises:
      UserError: there is no VAE there, or its latents are not the model's.
    """
    seed, model = config.seed, config.model
    shape = (model.input_size, model.input_size, model.channels)

    def draw(params: Any, index: Array, condition: dict) -> Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
        noise_keys, sampler_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        x0 = jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys)
        return sample(params, x0, sampler_keys, condition)

    batch = sharding.batch_sharding(mesh)
    draw = jax.jit(draw, in_shardings=(None, batch, batch), out_shardings=batch)
    if not config.data.vae:
        return draw
    vae = load_vae(config.data.vae, "config.data.vae")
    if vae.model.latent_channels != model.channels:
        raise UserError(
            f'config.data.vae = "{config.data.vae}" decodes {vae.model.latent_channels} channels, but '
            f"config.model.channels = {model.channels}; name another VAE."
        )
    decode = make_decoder(vae, mesh)
    return lambda params, index, condition: decode(draw(params, index, condition))


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """[H, W, C] of what `make_sampler` draws. Raises UserError if there is no VAE in `config.data.vae`."""
    side = config.model.input_size
    if not config.data.vae:
        return side, side, config.model.channels
    side *= read_factor(config.data.vae, "config.data.vae")
    return side, side, 3


def restore(config: ConfigDict, workdir: str, mesh: Mesh, step: int | None) -> tuple[Any, int]:
    """The EMA weights of a run's checkpoint on `mesh`, assembled with what it holds frozen, and its step.

    Raises UserError as `checkpoint.restore_ema` and `init_from.load_base`, and if the processes of the job see another
    run or other checkpoints.
    """
    facts = {f'the config of "{workdir}"': config.to_json(), f'the steps of "{workdir}"': saved_steps(workdir)}
    hosts.agree(facts, "the checkpoint")
    objective = objectives.build(config)
    weights = sharding.abstract(mesh, lambda: objective.init_sampled(jax.random.key(config.seed)))
    ema, step = restore_ema(workdir, weights, step)
    if config.lora.rank == 0:
        return ema, step
    abstract = sharding.abstract(mesh, lambda: objective.init_frozen(jax.random.key(config.seed))["base"])
    return objective.assemble(ema, {"base": load_base(config, abstract)}), step


def sample_images(
    draw: Callable,
    params: Any,
    condition: dict,
    batch_size: int,
    mesh: Mesh,
    *,
    first: int = 0,
    as_uint8: bool = True,
) -> Iterator[np.ndarray]:
    """Yields samples first, first + 1, ... of `condition` in batches [b, H, W, C]: uint8, or float32 as drawn.

    Every process gets all images. Batches are of batch_size, or a few more that the devices can share evenly; the
    last is filled up, so that one program serves all.

    Raises:
      UserError: a sample holds NaN or infinity, which uint8 would hide.
    """
    sharded, parts = sharding.batch_sharding(mesh), sharding.batch_shards(mesh)
    total = conditions.length(condition)
    batch_size = parts * -(-min(batch_size, total) // parts)
    for start in range(first, total, batch_size):
        count = min(batch_size, total - start)
        index = np.arange(batch_size, dtype=np.int32) + start
        places = np.minimum(index, total - 1)  # the last batch repeats the last condition
        batch = index, jax.tree.map(lambda x: x[places], condition)  # noqa: B023
        images = draw(params, *jax.device_put(batch, sharded))
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
    config: ConfigDict, workdir: str, step: int | None, names: list[str] | None, num_per_name: int, out: str
) -> None:
    """Draws `num_per_name` samples of each condition from a run's EMA and writes them to `out`.

    A .png is a grid with a column per condition, captions below the images; an .npz is in the ADM layout, or holds
    float32 latents as they are. Of several processes the first writes.

    Args:
      config: of the run, with the sampler and seed of these samples.
      workdir: the run.
      step: its checkpoint, None for the latest.
      names: conditions as `conditions.Labels.parse` or `captions.of_prompts` reads them.
      num_per_name: samples of each.
      out: the file.

    Raises:
      UserError: a condition, file type or checkpoint does not exist.
    """
    path = files.path(out)
    files.check_output(out, "--out", ".png", ".npz")
    is_image = config.model.space == "pixels" or bool(config.data.vae)
    if path.suffix == ".png" and not is_image:
        raise UserError(
            f'--out = "{out}": the model makes latents of {config.model.channels} channels; name their VAE '
            "with --vae, or write an .npz."
        )
    kind = conditions.build(config.model)
    columns = kind.parse(names) if isinstance(kind, conditions.Labels) else of_prompts(config, names)
    captions = None if isinstance(kind, conditions.Labels) else list(names) * num_per_name
    sharding.fit(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        ema, _ = restore(config, workdir, mesh, step)
        condition = jax.tree.map(lambda x: np.concatenate([x] * num_per_name), columns)
        draw = make_sampler(config, objectives.build(config).sample, mesh)
        batches = sample_images(draw, ema, condition, config.eval.batch_size, mesh, as_uint8=is_image)
        images = np.concatenate(list(batches))
    if jax.process_index() > 0:
        return
    with files.writing(out, "--out"):
        if path.suffix == ".png":
            save_grid(path, images, columns=conditions.length(columns), captions=captions)
        else:
            names = np.array(captions) if captions else condition["label"].astype(np.int64)
            with files.replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, images, names)
