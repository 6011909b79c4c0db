"""Checks a config before anything runs: each section by the package that reads it, and here what spans sections."""

from ml_collections import ConfigDict

from dar_jax.config import check_fields
from dar_jax.errors import require


def validate(config: ConfigDict) -> None:
    """Raises UserError, in one line, for the first value that cannot work. Touches no device and no file."""
    # Imported here, so that a door can be asked for its --help without jax.
    from dar_jax import diffusion, sharding
    from dar_jax.data import feed, sources
    from dar_jax.diffusion import sampler
    from dar_jax.evaluation import in_training
    from dar_jax.models import check as models
    from dar_jax.objectives import adapted, dmd, repa
    from dar_jax.training import loop, optimizer

    check_fields(config)
    models.check(config.model)
    sources.check(config.data)
    diffusion.check(config.diffusion)
    sampler.check(config.sampler)
    optimizer.check(config.optimizer)
    loop.check(config.train)
    in_training.check(config.eval)
    sharding.check(config.mesh)
    _check_space(config, feed.encodes_online(config))
    _check_buckets(config)
    repa.check(config)
    adapted.check(config)
    dmd.check(config)
    require(
        config.sampler.cfg_channels <= config.model.channels,
        f"config.sampler.cfg_channels = {config.sampler.cfg_channels} must be in 0 (all) to "
        f"config.model.channels = {config.model.channels}.",
    )
    if config.eval.every_steps:
        _check_evaluation(config)


def _check_space(config: ConfigDict, is_online: bool) -> None:
    model, data = config.model, config.data
    is_latent = model.space == "latents"
    require(
        not is_online or data.vae != "",
        f'config.model.space = latents, but config.data.source = "{data.source}" has images; name in config.data.vae '
        "the VAE that encodes them.",
    )
    require(
        is_latent or data.source != "synthetic",
        'config.data.source = "synthetic" makes latents; set config.model.space = latents and config.model.channels to '
        "theirs, as 4.",
    )
    require(
        is_latent or data.vae == "",
        f'config.data.vae = "{data.vae}" is of no use to a model of pixels; set config.model.space = latents, or '
        "config.data.vae to nothing.",
    )
    require(
        is_online or data.image_size == model.input_size,
        f"config.data.image_size = {data.image_size} must equal config.model.input_size = {model.input_size}.",
    )


def _check_buckets(config: ConfigDict) -> None:
    from dar_jax.data.buckets import parse_buckets

    model, buckets = config.model, config.data.buckets
    if not buckets:
        return
    require(
        model.family == "mmdit",
        f"config.data.buckets: config.model.family = {model.family} takes squares of one size; set family = mmdit, or "
        "buckets to ().",
    )
    require(
        config.data.source != "latents" or not config.diagnosis.every_steps,
        f"config.data.buckets: config.diagnosis.every_steps = {config.diagnosis.every_steps} needs squares, which data "
        "prepared in buckets do not have; set it to 0.",
    )
    require(
        config.data.source != "synthetic",
        "config.data.buckets: config.data.source = synthetic makes squares; set buckets to ().",
    )
    require(
        config.repa.target == "none",
        f"config.data.buckets: config.repa.target = {config.repa.target} compares squares of one size; set it to none, "
        "or buckets to ().",
    )
    for name, sides in zip(buckets, parse_buckets(buckets, "config.data.buckets"), strict=True):
        require(
            model.space == "latents" or not any(side % model.patch_size for side in sides),
            f'config.data.buckets: the sides of "{name}" must be divisible by config.model.patch_size = '
            f"{model.patch_size}.",
        )


def _check_evaluation(config: ConfigDict) -> None:
    settings, is_latent = config.eval, config.model.space == "latents"
    require(
        not is_latent or config.data.vae != "",
        f"config.eval.every_steps = {settings.every_steps} asks for images, but the model makes latents of "
        f"{config.model.channels} channels; name their VAE in config.data.vae, or set every_steps = 0.",
    )
    if settings.num_samples == 0:
        return
    require(
        not is_latent or bool(settings.inception and settings.reference),
        f"config.eval.num_samples = {settings.num_samples}: to score decoded latents, set config.eval.inception and "
        "config.eval.reference; set num_samples = 0 to draw grids only.",
    )
    require(
        bool(settings.inception) or 8 <= config.data.image_size <= 64,
        f"config.data.image_size = {config.data.image_size} is not in 8..64, as fd_convnet needs; "
        "set config.eval.inception, or config.eval.num_samples = 0 to draw grids only.",
    )
