"""Does routing help? Fashion-MNIST, 14 blocks of width 64, against honest rivals, each at its own best learning rate.

Targets fixed beforehand: validation loss after 400 steps (ten fixed t-buckets, held-out images, EMA weights); steps and
time until fixed losses. Rates are tried with seed 0, and each cell runs the other seeds at its best one. The
learning rate is constant after the warmup, so that a loss on the way is that of a shorter run. residual_wide has 72
features, 26 % more parameters: more than any cell.

    python studies/does_it_help.py --root=runs/does_it_help
"""

from study import Study, main

SHARED = (
    "--config.model.hidden_size=64",
    "--config.train.num_steps=400",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=50",
    "--config.optimizer.ema_decay=0.99",
    "--config.sampler.num_steps=8",
    "--config.sampler.cfg_scale=1.0",
    "--config.eval.every_steps=100",
    "--config.eval.num_samples=0",
    "--config.eval.final_samples=1000",
    "--config.checkpoint.every_steps=400",
)

STUDY = Study(
    name="does_it_help",
    config="configs/fashion_mnist.py",
    cells={
        "residual": ("residual",),
        "residual_wide": ("residual", "--config.model.hidden_size=72"),
        "uniform": ("uniform", "--config.model.routing.summary=sum"),
        "static": ("static",),
        "static_t": ("static_t",),
        "gated_t": ("gated_t",),
        "dynamic": ("dynamic",),
        "shared": ("shared", "--config.model.routing.summary=sum"),
        "static_sum": ("static", "--config.model.routing.summary=sum"),
        "long_skip": ("long_skip",),
        "hyper": ("hyper", "--config.model.routing.lanes=2"),
        "mhc": ("mhc",),
        "dense_former": ("dense_former",),
        "delta": ("delta",),
    },
    shared=SHARED,
    seeds=(0, 1, 2),
    differences=(
        ("residual_wide", "residual"),
        ("uniform", "residual"),
        ("static", "residual"),
        ("static_t", "residual"),
        ("gated_t", "residual"),
        ("dynamic", "residual"),
        ("shared", "residual"),
        ("static_sum", "residual"),
        ("long_skip", "residual"),
        ("hyper", "residual"),
        ("mhc", "residual"),
        ("dense_former", "residual"),
        ("delta", "residual"),
        ("static_t", "static"),
        ("gated_t", "static_t"),
        ("static_sum", "uniform"),
    ),
    rates=(4e-3, 8e-3, 1.6e-2),
    further_rates=(2e-3, 3.2e-2),
    sweep_seeds=(0,),
    metrics=("val_loss",),
    targets=(0.7, 0.6, 0.5),
)

if __name__ == "__main__":
    main(STUDY)
