"""Does routing help where the residual stream must carry noise? Velocity or x, patches of 7 or 14 pixels, three seeds.

A model that predicts the velocity has to hand the noise of its input on to its output; one that predicts x does not. A
patch of 14 x 14 has 196 pixels, more than the 64 features of the stream. The hypothesis, of arXiv 2609.33895 for
hyper-connections: other ways across depth help most with velocity and large patches. Target fixed beforehand:
fd_convnet of 1,000 samples after 400 steps, because losses of velocity and of x are not comparable. All cells have the
same learning rate. Otherwise as studies/does_it_help.py.

    python studies/prediction.py --root=runs/prediction
"""

import itertools

from does_it_help import SHARED
from study import Study, main

VARIANTS, PREDICTIONS, PATCHES = ("residual", "static_t", "mhc"), ("velocity", "x"), (7, 14)

SCORED = ("--config.eval.every_steps=200", "--config.eval.num_samples=1000")


def cell(variant: str, prediction: str, patch: int) -> tuple[str, ...]:
    return variant, f"--config.diffusion.prediction={prediction}", f"--config.model.patch_size={patch}"


SETTINGS = tuple(itertools.product(PREDICTIONS, PATCHES))
STUDY = Study(
    name="prediction",
    config="configs/fashion_mnist.py",
    cells={f"{v}_{p}_{n}": cell(v, p, n) for (p, n) in SETTINGS for v in VARIANTS},
    shared=(*SHARED, *SCORED, "--config.optimizer.learning_rate=0.004"),
    seeds=(0, 1, 2),
    differences=[(f"{v}_{p}_{n}", f"residual_{p}_{n}") for (p, n) in SETTINGS for v in VARIANTS if v != "residual"],
    metrics=("fd_convnet", "val_loss"),
)

if __name__ == "__main__":
    main(STUDY)
