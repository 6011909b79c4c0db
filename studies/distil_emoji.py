"""Do routed students keep more detail in four steps than residual ones? Emoji with their sharp edges, three seeds.

Targets fixed beforehand, after 60 updates: fd_convnet on held-out captions, the share of samples with the skin tone of
the caption, and the detail of the samples beside real images and beside the teacher's. As studies/distil.py otherwise.
The teachers are the residual runs of studies/text_to_image.py, whose root is this one's too, so run that study first.

    python studies/distil_emoji.py --root=runs/text_to_image
"""

from study import Study, main
from text_to_image import STUDY as TEXT_TO_IMAGE

UNCHANGED = ("--config.init_from={root}/residual_{seed}", "--config.train.num_steps=1", "--config.eval.every_steps=1")
UNCHANGED += ("--config.optimizer.learning_rate=0.0", "--config.sampler.method=euler", "--config.sampler.num_steps=4")
STUDENT = ("--config.teacher={root}/residual_{seed}", "--config.train.num_steps=60", "--config.eval.every_steps=30")

STUDY = Study(
    name="distil_emoji",
    config="configs/emoji.py",
    cells={
        "residual": TEXT_TO_IMAGE.cells["residual"],
        "residual_4_euler": ("residual", *UNCHANGED),
        "student_residual": ("residual+dmd", *STUDENT),
        "student_static_t": ("static_t+dmd", *STUDENT, "--config.model.routing.summary=sum"),
    },
    shared=TEXT_TO_IMAGE.shared,
    seeds=(0, 1, 2),
    differences=(
        ("student_static_t", "student_residual"),
        ("student_residual", "residual"),
        ("student_static_t", "residual"),
    ),
    metrics=("fd_convnet", "accuracy/tone", "lsd_high_teacher", "lsd_high", "hf_half", "laplacian", "grad_norm"),
    baselines=("residual", "residual_4_euler"),
    detail="residual",
)

if __name__ == "__main__":
    main(STUDY)
