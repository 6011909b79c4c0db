"""Do routed students keep more detail in four steps than residual ones? Emoji with their sharp edges, three seeds.

Targets fixed beforehand, after 60 updates: fd_convnet on held-out captions, the share of samples with the skin tone of
the caption, and the detail of the samples beside real images and beside the teacher's. As studies/distil.py otherwise.
The teachers are the residual runs of studies/text_to_image.py, whose root is this one's too, so run that study first.

    python studies/distil_emoji.py --root=runs/text_to_image
"""

from distil import in_four_euler_steps, student
from study import Study, main
from text_to_image import STUDY as TEXT_TO_IMAGE

STUDY = Study(
    name="distil_emoji",
    config="configs/emoji.py",
    cells={
        "residual": TEXT_TO_IMAGE.cells["residual"],
        "residual_4_euler": in_four_euler_steps("residual"),
        "student_residual": student("residual", "residual", 60, 30),
        "student_static_t": student("static_t", "residual", 60, 30),
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
