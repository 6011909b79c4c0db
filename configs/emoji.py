"""Text to image on a laptop: an MM-DiT that draws emoji of 32x32 pixels from their captions.

    pip install emoji && apt-get install fonts-noto-color-emoji
    python -m dar_jax.main --config=configs/emoji.py --workdir=runs/emoji
    python -m dar_jax.sample --workdir=runs/emoji --prompts="tiger face;woman cook: dark skin tone" --out=grid.png

The variants are residual, static, static_t (the default) and dynamic; --config.model.routing.streams=both routes the
text stream too. The words of a caption are embedded and encoded by a transformer that is trained along. Of every
subject with a skin tone one tone is held out: val_loss, fd_convnet and accuracy/* are of these captions, and
accuracy_seen/* of captions in the training split that ask for the same.

A run of static_t takes 88 minutes of processor time, compile, scores and grids included. At 3.2 steps/s on two CPU
cores that is about three quarters of an hour. fd_convnet falls from 6.4 at step 2,000 to 1.9. People, couples and hands
are recognised from captions that were never seen, with their skin tones (docs/text_to_image.md). Objects of which there
is a single picture are seldom recognised.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.update(source="emoji", image_size=32)
    config.model.update(family="mmdit", input_size=32, channels=3, patch_size=4)
    config.model.update(depth=6, hidden_size=128, num_heads=4)
    config.model.update(text_length=11, text_size=128, text_depth=2)
    config.model.routing.chunk_size = 4
    config.train.update(num_steps=8000, batch_size=32, log_every_steps=100)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995)
    config.sampler.update(method="heun", num_steps=10, cfg_scale=2.5)
    config.eval.update(every_steps=2000, num_samples=377, final_samples=377, batch_size=128, loss_images=377)
    config.checkpoint.every_steps = 500
    repa = {"repa.target": "hog", "repa.block": 2, "repa.later_block": 4}
    dmd = {**config_lib.DMD, "train.num_steps": 200, "train.log_every_steps": 20, "eval.every_steps": 50}
    dmd |= {"optimizer.learning_rate": 2e-4, "optimizer.ema_decay": 0.98, "dmd.fake_learning_rate": 4e-4}
    dmd |= {"dmd.fake_updates": 3, "dmd.guidance": 2.5, "checkpoint.every_steps": 50}
    return config_lib.route(config, variant, repa=repa, dmd=dmd)
