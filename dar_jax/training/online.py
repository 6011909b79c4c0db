"""Latents encoded while training: for a model of latents over a source of images, so that nothing need be prepared."""

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax.errors import UserError
from dar_jax.pretrained.vae import load, make_encoder


def make_online_encoder(config: ConfigDict, mesh: Mesh) -> Callable[[Array, int], Array]:
    """Returns (images float32 [B, H, W, 3] in [-1, 1], step) -> scaled latents float32 [B, h, w, C].

    Each is a draw from its distribution, whose noise follows from config.seed and the step, whatever the mesh.

    Raises:
      UserError: config.data.vae is no VAE, or its latents of these images are not the model's input.
    """
    vae, model = load(config.data.vae, "config.data.vae"), config.model
    side = config.data.image_size // vae.model.factor
    if (side, vae.model.latent_channels) != (model.input_size, model.channels):
        raise UserError(
            f"config.data.image_size = {config.data.image_size} makes latents of {side}x{side}x"
            f"{vae.model.latent_channels} in config.data.vae, but config.model takes {model.input_size}x"
            f"{model.input_size}x{model.channels}; set image_size to input_size * {vae.model.factor}."
        )

    @jax.jit
    def draw(moments: Array, step: Array) -> Array:
        # Split off once more than the train step does, whose noise must be another.
        key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 3)[2]
        mean, std = moments[:, 0], moments[:, 1]
        return vae.scale * (mean + std * jax.random.normal(key, mean.shape))

    encode = make_encoder(vae, mesh)
    return lambda images, step: draw(encode(images), step)
