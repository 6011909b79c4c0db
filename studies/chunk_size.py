"""How long may a chunk be? static_t on Fashion-MNIST with chunks of 1, 2, 4, 14 and 28 sublayers, three seeds.

Target fixed beforehand: validation loss after 400 steps. Otherwise as studies/does_it_help.py, at the learning rate
which was best for static_t there. The paper finds a U: chunks of 4 better than longer and shorter ones.

    python studies/chunk_size.py --root=runs/chunk_size
"""

from does_it_help import SHARED
from study import Study, main

SIZES = (1, 2, 4, 14, 28)

STUDY = Study(
    name="chunk_size",
    config="configs/fashion_mnist.py",
    cells={f"chunk_{size}": ("static_t", f"--config.model.routing.chunk_size={size}") for size in SIZES},
    shared=(*SHARED, "--config.optimizer.learning_rate=0.008"),
    seeds=(0, 1, 2),
    metrics=("val_loss",),
    differences=[(f"chunk_{size}", "chunk_4") for size in SIZES if size != 4],
)

if __name__ == "__main__":
    main(STUDY)
