"""Does alignment help a residual and a routed model? Fashion-MNIST, 14 blocks of width 64, three paired seeds.

Targets fixed beforehand: validation loss and fd_convnet after 800 steps, each aligned cell against the plain one of
the same routing, and static_t against residual. The network of fd_convnet is a classifier, which no cell is aligned
with. hog aligns block 4 with oriented gradients through a 3x3 convolution, later_block with the state behind block 8.

    python studies/repa.py --root=runs/repa
"""

from study import Study, main

HOG = ("--config.repa.projector=conv",)
LATER = ("--config.repa.target=later_block",)

STUDY = Study(
    name="repa",
    config="configs/fashion_mnist.py",
    cells={
        "residual": ("residual",),
        "static_t": ("static_t",),
        "residual_hog": ("residual+repa", *HOG),
        "static_t_hog": ("static_t+repa", *HOG),
        "residual_later": ("residual+repa", *LATER),
        "static_t_later": ("static_t+repa", *LATER),
    },
    shared=(
        "--config.model.hidden_size=64",
        "--config.train.num_steps=800",
        "--config.optimizer.warmup_steps=100",
        "--config.optimizer.ema_decay=0.99",
        "--config.sampler.num_steps=8",
        "--config.sampler.cfg_scale=1.0",
        "--config.eval.every_steps=200",
        "--config.eval.num_samples=1000",
        "--config.eval.final_samples=1000",
        "--config.checkpoint.every_steps=200",
    ),
    seeds=(0, 1, 2),
    differences=(
        ("residual_hog", "residual"),
        ("static_t_hog", "static_t"),
        ("residual_later", "residual"),
        ("static_t_later", "static_t"),
        ("static_t", "residual"),
        ("static_t_hog", "residual_hog"),
        ("static_t_later", "residual_later"),
    ),
)

if __name__ == "__main__":
    main(STUDY)
