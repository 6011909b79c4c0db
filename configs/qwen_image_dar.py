"""Adapters and Diffusion-Adaptive Routing on Qwen-Image, an MM-DiT of 20 billion frozen parameters, at 1024x1024.

    python -m dar_jax.main --config=configs/qwen_image_dar.py:static_t@v5p --workdir=runs/qwen_dar

The variants are residual, static, static_t (the default) and dynamic. After an @ comes the hardware, which sets
config.mesh. The adapters have rank 64, as in the paper, on the twelve linear layers of each block's attention and MLPs.
The image stream is routed in chunks of 6 sublayers with sums as summaries, so that training starts with the function of
the frozen weights. Routing has a learning rate of its own. The batch is one sample for each of 32 chips. A +dmd, as in
static_t+dmd@v5p, distils the model to four steps with the paper's rates (docs/distil.md).

qwen_image is the workdir of the frozen weights, and latents/train holds latents and embeddings of captions, which
dar_jax.prepare wrote with --vae=qwen_vae and --text_encoder (docs/text_to_image.md). Nothing is measured here: no TPU
and no GPU has run this config, and the published weights have not been tried.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.init_from = "qwen_image"
    config.data.update(source="latents", path="latents", vae="qwen_vae", image_size=128)
    config.model.update(family="mmdit", space="latents", input_size=128, channels=16, patch_size=2)
    config.model.update(depth=60, hidden_size=3072, num_heads=24, dtype="bfloat16", remat="block")
    config.model.update(text="embeddings", text_size=3584, text_length=512)
    config.diffusion.update(time="shifted", time_shift=3.0)
    config.model.routing.update(chunk_size=6, summary="sum", streams="image")
    config.lora.update(rank=64, alpha=64.0)
    config.train.update(num_steps=10_000, batch_size=32, log_every_steps=10)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=100, clip_norm=1.0, ema_decay=0.999)
    config.sampler.update(method="euler", num_steps=50, cfg_scale=4.0, cfg_rescale=True)
    config.sampler.update(schedule="shifted", terminal_s=0.02)
    config.eval.update(every_steps=0, num_samples=0, grid_size=4, batch_size=16)
    config.checkpoint.update(every_steps=500)
    dmd = {**config_lib.DMD, "train.num_steps": 2000, "optimizer.learning_rate": 5e-6, "optimizer.b1": 0.0}
    dmd |= {"dmd.fake_learning_rate": 2e-6, "dmd.fake_rank": 64, "dmd.shift": 3.0, "dmd.guidance": 4.0}
    dmd |= {"dmd.guidance_rescale": True, "dmd.renoise_shift": 5.0, "teacher": "qwen_image"}
    config_lib.route(config, variant, dmd=dmd)
    if config.model.routing.kind == "dar":
        config.optimizer.groups = ((".*query.*", {"learning_rate": 1e-3}),)
    return config
