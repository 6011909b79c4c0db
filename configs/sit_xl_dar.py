"""SiT-XL/2 with Diffusion-Adaptive Routing on ImageNet 256x256 (latents of 32x32x4), with the paper's recipe.

    python -m dar_jax.main --config=configs/sit_xl_dar.py:static_t@v5e --workdir=runs/sit_xl_dar

The recipe has batch 1024. The variants are residual, static, static_t (the default) and dynamic, all with chunks of 4
sublayers ("c4"). After an @ comes the hardware, which sets config.mesh: v4, v5e, v5p or v6e (TPU slices), or gpu8
(hosts of 8 GPUs). A +repa, as in static_t+repa@v5e, adds REPA's alignment with DINOv2-B: the latents must have been
prepared with --keep_images, and dinov2_b must hold the weights (docs/repa.md). A +dmd distils the run that
--config.teacher names to four steps, with the rates of DMDR (docs/distil.md).

A step keeps the outputs of dense layers, config.model.remat = dense, for which 16 chips of v5e have the memory
(docs/plan.md). With less, take --config.model.remat=block, which computes them once more.

The paper reports FID 7.56 for static_t (ODE, 600K steps, no guidance), at 0.59 s a step on its H20 GPUs. It reports
9.67 for the residual SiT at 1.75M steps. Nothing is measured here: no TPU and no GPU has run this config.

The data are latents that dar_jax.prepare wrote to latents/train. vae is the VAE that made them, and it decodes the
sample grid. --config.data.source=synthetic --config.eval.every_steps=0 times the step without either.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.update(source="latents", path="latents", vae="vae", image_size=32, flip=True)
    config.model.update(space="latents", input_size=32, channels=4, num_classes=1000)
    config.model.update(patch_size=2, dtype="bfloat16")
    config.model.update(**config_lib.SIZES["XL"])
    config.model.routing.chunk_size = 4
    config.train.update(num_steps=600_000, batch_size=1024, log_every_steps=100)
    config.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, ema_decay=0.9999)
    config.sampler.update(method="heun", num_steps=125, cfg_scale=1.0)
    config.eval.update(every_steps=10_000, num_samples=0, grid_size=8, batch_size=64)
    config.checkpoint.update(every_steps=10_000, keep=3)
    repa = {"repa.target": "encoder", "repa.encoder": "dinov2_b", "repa.weights": "dinov2_b", "repa.block": 8}
    repa |= {"optimizer.clip_norm": 1.0, "model.routing.final": "shared"}
    dmd = {**config_lib.DMD, "train.num_steps": 20_000, "train.batch_size": 512, "optimizer.clip_norm": 1.0}
    dmd |= {"optimizer.learning_rate": 2e-5, "optimizer.weight_decay": 0.01, "dmd.fake_learning_rate": 2e-5}
    dmd |= {"dmd.renoise": "beta", "eval.every_steps": 1000}
    return config_lib.route(config, variant, repa=repa, dmd=dmd)
