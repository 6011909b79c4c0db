"""Adapters and Diffusion-Adaptive Routing on Qwen-Image, an MM-DiT of 20 billion frozen parameters, at 1024x1024.

    python -m dar_jax.plan --config=configs/qwen_image_dar.py:static_t@v5p --topology=v5p:2x4x4

The variants are residual, static, static_t (the default) and dynamic. After an @ comes the hardware, which sets
config.mesh. The adapters have rank 64, as in the paper, on the twelve linear layers of each block's attention and MLPs.
The image stream is routed in chunks of 6 sublayers with sums as summaries, so that training starts with the function of
the frozen weights. Routing has a learning rate of its own. The batch is one sample for each of 32 chips.

qwen_image is a workdir of the frozen weights. The text is words, which no layer reads before the model's own linear
layer of 3584 features: embeddings of Qwen2.5-VL are no condition of a run yet. So today this config is for the planner.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.init_from = "qwen_image"
    config.data.update(source="latents", path="latents", vae="vae", image_size=128)
    config.model.update(family="mmdit", space="latents", input_size=128, channels=16, patch_size=2)
    config.model.update(depth=60, hidden_size=3072, num_heads=24, dtype="bfloat16", remat="block")
    config.model.update(text_size=3584, text_length=512, text_depth=0)
    config.model.routing.update(chunk_size=6, summary="sum", streams="image")
    config.lora.update(rank=64, alpha=64.0)
    config.train.update(num_steps=10_000, batch_size=32, log_every_steps=10)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=100, clip_norm=1.0, ema_decay=0.999)
    config.sampler.update(method="euler", num_steps=50, cfg_scale=4.0)
    config.eval.update(every_steps=0, num_samples=0, grid_size=4, batch_size=16)
    config.checkpoint.update(every_steps=500)
    config_lib.route(config, variant)
    if config.model.routing.kind == "dar":
        config.optimizer.groups = ((".*query.*", {"learning_rate": 1e-3}),)
    return config
