"""SiT-XL/2 with Diffusion-Adaptive Routing, the paper's recipe at ImageNet 256x256 (latents 32x32x4, batch 1024).

    python -m dar_jax.main --config=configs/sit_xl_dar.py:static_t@v5e --workdir=runs/sit_xl_dar

Variants: residual | static | static_t (default) | dynamic, and after an @ the hardware, which sets config.mesh: v4 |
v5e | v5p | v6e (TPU slices) | gpu8 (hosts of 8 GPUs). All with chunks of 4 sublayers ("c4"). The paper reports
FID 7.56 (static_t, ODE, 600K steps, no guidance) against 9.67 for the residual SiT at 1.75M steps, at 0.59 s a step
on its H20 GPUs. Not measured here: no TPU or GPU run of this config has been made.

The data are latents that dar_jax.prepare wrote to latents/train, and vae is the VAE that made them, which decodes the
sample grid. --config.data.source=synthetic --config.eval.every_steps=0 times the step without either.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.update(source="latents", path="latents", vae="vae", image_size=32, flip=True)
    config.model.update(space="latents", input_size=32, channels=4, num_classes=1000)
    config.model.update(patch_size=2, dtype="bfloat16", remat="block")
    config.model.update(**config_lib.SIZES["XL"])
    config.model.routing.chunk_size = 4
    config.train.update(num_steps=600_000, batch_size=1024, log_every_steps=100)
    config.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, ema_decay=0.9999)
    config.sampler.update(method="heun", num_steps=125, cfg_scale=1.0)
    config.eval.update(every_steps=10_000, num_samples=0, grid_size=8, batch_size=64)
    config.checkpoint.update(every_steps=10_000, keep=3)
    return config_lib.route(config, variant)
