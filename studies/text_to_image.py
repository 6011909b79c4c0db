"""Does routing help text to image? Emoji at 32x32 from their captions, MM-DiT of 6 blocks, three paired seeds.

Targets fixed beforehand, after 1,000 steps on captions that were held out: validation loss, fd_convnet, and the share
of samples with the skin tone and the person that the caption asks for (higher is better). accuracy_seen/* is of
captions in the training split that ask for the same.

    python studies/text_to_image.py --root=runs/text_to_image
"""

from study import Study, main

STUDY = Study(
    name="text_to_image",
    config="configs/emoji.py",
    cells={"residual": ("residual",), "static_t": ("static_t",)},
    shared=(
        "--config.train.num_steps=1000",
        "--config.sampler.num_steps=8",
        "--config.eval.every_steps=500",
    ),
    seeds=(0, 1, 2),
    differences=(("static_t", "residual"),),
    metrics=(
        "val_loss",
        "fd_convnet",
        "accuracy/tone",
        "accuracy/person",
        "accuracy_seen/tone",
        "accuracy_seen/person",
    ),
)

if __name__ == "__main__":
    main(STUDY)
