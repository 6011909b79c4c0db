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


def in_four_euler_steps(teacher: str) -> tuple[str, ...]:
    """A cell with the weights of the cell `teacher`, which it leaves as they are."""
    start = (f"--config.init_from={{root}}/{teacher}_{{seed}}", "--config.optimizer.learning_rate=0.0")
    once = ("--config.train.num_steps=1", "--config.eval.every_steps=1")
    return ("residual", *start, *once, "--config.sampler.method=euler", "--config.sampler.num_steps=4")


def student(variant: str, teacher: str, updates: int, every: int) -> tuple[str, ...]:
    """A cell that distils the cell `teacher`. Sums let a routed student begin as the same function."""
    flags = (f"--config.teacher={{root}}/{teacher}_{{seed}}", "--config.model.routing.summary=sum")
    return (f"{variant}+dmd", *flags, f"--config.train.num_steps={updates}", f"--config.eval.every_steps={every}")


STUDY = Study(
    name="distil",
    config="configs/fashion_mnist.py",
    cells={
        "teacher": ("residual", *TEACHER),
        "teacher_4_euler": in_four_euler_steps("teacher"),
        "residual": student("residual", "teacher", 100, 25),
        "static_t": student("static_t", "teacher", 100, 25),
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
