"""SiT with Diffusion-Adaptive Routing on scikit-learn's digits: 1,797 grey images of 8x8, which its wheel contains.

    python -m dar_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m dar_jax.main --config=configs/digits.py:residual --workdir=runs/digits_residual

The variants are residual, static, static_t (the default) and dynamic; :residual+repa and :static_t+repa align a state
with histograms of oriented gradients (docs/repa.md). A +dmd, as in residual+dmd, distils the run that --config.teacher
names to four steps (docs/distil.md). On two CPU cores a run takes eight minutes of processor time, and the residual
six. fd_convnet falls from about 40 at step 250 to about 2, and a person can read the digits in the grid.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.source = "digits"
    config.model.update(input_size=8, channels=1, num_classes=10, patch_size=2)
    config.model.update(depth=6, hidden_size=96, num_heads=4)
    config.model.routing.chunk_size = 4
    config.train.update(num_steps=1000, batch_size=64, log_every_steps=100)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=50, schedule="cosine", ema_decay=0.995)
    config.sampler.update(method="heun", num_steps=15, cfg_scale=1.5)
    config.eval.update(every_steps=250, num_samples=512, final_samples=512, batch_size=256, loss_images=256)
    config.checkpoint.every_steps = 250
    repa = {"repa.target": "hog", "repa.block": 2, "repa.later_block": 4}
    dmd = {**config_lib.DMD, "train.num_steps": 100, "train.log_every_steps": 20, "eval.every_steps": 50}
    dmd |= {"optimizer.learning_rate": 2e-4, "optimizer.ema_decay": 0.98, "dmd.fake_learning_rate": 4e-4}
    dmd |= {"dmd.fake_updates": 3, "checkpoint.every_steps": 50}
    return config_lib.route(config, variant, repa=repa, dmd=dmd)
