"""Do routed students draw better in four steps than residual ones? Digits, a residual teacher, three paired seeds.

Targets fixed beforehand: fd_convnet of the students after 300 updates, beside the teacher in its own 15 Heun steps (the
ceiling) and in four Euler steps (the floor), and the student of one step. Students of a seed have the same teacher, and
the routed one starts as the same function.

    python studies/distil.py --root=runs/distil
"""

from study import Study, main

TEACHER = "--config.teacher={root}/teacher_{seed}"
STUDENT = (TEACHER, "--config.train.num_steps=300", "--config.dmd.fake_updates=3")
UNCHANGED = ("--config.init_from={root}/teacher_{seed}", "--config.train.num_steps=1")
UNCHANGED += ("--config.optimizer.learning_rate=0.0", "--config.eval.every_steps=1")

STUDY = Study(
    name="distil",
    config="configs/digits.py",
    cells={
        "teacher": ("residual",),
        "teacher_4_euler": (
            "residual", *UNCHANGED, "--config.sampler.method=euler", "--config.sampler.num_steps=4",
        ),
        "residual": ("residual+dmd", *STUDENT),
        "static_t": ("static_t+dmd", *STUDENT, "--config.model.routing.summary=sum"),
        "residual_1_step": ("residual+dmd", *STUDENT, "--config.dmd.num_steps=1"),
    },
    shared=(),
    seeds=(0, 1, 2),
    differences=(("static_t", "residual"), ("residual", "teacher"), ("static_t", "teacher")),
    metrics=("fd_convnet",),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
