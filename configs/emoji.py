"""Text to image on two CPU cores."""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.update(source="emoji", image_size=32)
    config.model.update(family="mmdit", input_size=32, channels=3, patch_size=4)
    config.model.update(depth=8, hidden_size=128, num_heads=4)
    config.model.update(text_length=11, text_size=128, text_depth=2)
    config.model.routing.update(chunk_size=4)
    config.train.update(num_steps=2000, batch_size=64, log_every_steps=50)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995, clip_norm=1.0)
    config.sampler.update(method="heun", num_steps=15, cfg_scale=3.0)
    config.eval.update(every_steps=500, num_samples=377, final_samples=377, batch_size=128, loss_images=377)
    config.checkpoint.every_steps = 500
    return config_lib.route(config, variant, repa={"repa.target": "hog", "repa.block": 3})
