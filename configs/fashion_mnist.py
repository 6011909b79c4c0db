"""SiT with Diffusion-Adaptive Routing on Fashion-MNIST: 70,000 grey images of 28x28.

    apt-get install dataset-fashion-mnist
    python -m dar_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion

The package is Debian's. On other systems, point --config.data.path at the directory of the four idx files. The variants
are residual, static, static_t (the default) and dynamic; :residual+repa and :static_t+repa align a state with
histograms of oriented gradients (docs/repa.md). A patch is 7x7 pixels, and an image is 16 tokens. The residual model
takes about half an hour of one busy CPU core and ends at a validation loss of 0.292 and an fd_convnet of 4.9; its
students are in docs/distil.md. The routed variants were not run at this width and length.
"""

from dar_jax import config as config_lib


def get_config(variant=None):
    config = config_lib.default()
    config.data.update(source="idx", path="/usr/share/datasets/fashion-mnist", image_size=28, flip=True)
    config.model.update(input_size=28, channels=1, num_classes=10, patch_size=7)
    config.model.update(depth=14, hidden_size=128, num_heads=4)
    config.model.routing.chunk_size = 4
    config.train.update(num_steps=3000, batch_size=64, log_every_steps=50)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=200, schedule="cosine", ema_decay=0.998)
    config.sampler.update(method="heun", num_steps=20, cfg_scale=1.5)
    config.eval.update(every_steps=500, num_samples=512, final_samples=512, batch_size=256, loss_images=1024)
    config.checkpoint.every_steps = 500
    repa = {"repa.target": "hog", "repa.block": 4, "repa.later_block": 8}
    dmd = {**config_lib.DMD, "train.num_steps": 200, "train.log_every_steps": 20, "eval.every_steps": 50}
    dmd |= {"optimizer.learning_rate": 2e-4, "optimizer.ema_decay": 0.98, "dmd.fake_learning_rate": 4e-4}
    dmd |= {"dmd.fake_updates": 3, "dmd.guidance": 1.5, "checkpoint.every_steps": 50}
    return config_lib.route(config, variant, repa=repa, dmd=dmd)
