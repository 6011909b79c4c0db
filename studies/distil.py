"""Do routed students keep more detail in four steps than residual ones? Fashion-MNIST, a residual teacher, three seeds.

Targets fixed beforehand, after 100 updates: fd_convnet, and the detail of 1,024 samples beside real images and beside
the teacher's samples of the same seeds. The teacher in its own 20 Heun steps is the ceiling, in four Euler steps the
floor. The students of a seed have the same teacher, and the routed one starts as the same function. A run that diverges
shows in grad_norm.

    python studies/distil.py --root=runs/distil
"""

from study import Study, main

SMALL = ("--config.model.depth=8", "--config.model.hidden_size=64", "--config.model.patch_size=4")
TEACHER = ("--config.train.num_steps=1500", "--config.optimizer.warmup_steps=100", "--config.optimizer.ema_decay=0.99")
UNCHANGED = ("--config.init_from={root}/teacher_{seed}", "--config.train.num_steps=1", "--config.eval.every_steps=1")
UNCHANGED += ("--config.optimizer.learning_rate=0.0", "--config.sampler.method=euler", "--config.sampler.num_steps=4")
STUDENT = ("--config.teacher={root}/teacher_{seed}", "--config.train.num_steps=100", "--config.eval.every_steps=25")

STUDY = Study(
    name="distil",
    config="configs/fashion_mnist.py",
    cells={
        "teacher": ("residual", *TEACHER),
        "teacher_4_euler": ("residual", *UNCHANGED),
        "residual": ("residual+dmd", *STUDENT),
        "static_t": ("static_t+dmd", *STUDENT, "--config.model.routing.summary=sum"),
    },
    shared=SMALL,
    seeds=(0, 1, 2),
    differences=(("static_t", "residual"), ("residual", "teacher"), ("static_t", "teacher")),
    metrics=("fd_convnet", "lsd_high_teacher", "lsd_high", "hf_half", "laplacian", "grad_norm"),
    baselines=("teacher", "teacher_4_euler"),
    detail="teacher",
)

if __name__ == "__main__":
    main(STUDY)
