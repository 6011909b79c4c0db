"""Do the differences of new_seeds.py last? The same four cells for three times as many steps, with three more seeds.

Fixed beforehand: cells, steps, seeds, the differences, and the measure, the validation loss after 1200 steps. The rate
is that of the short runs, which nobody has tuned for longer ones.

    python studies/longer.py --root=runs/longer
"""

from new_seeds import STUDY as SHORT
from study import main

STEPS = 1200

STUDY = SHORT._replace(
    name="longer",
    shared=(*SHORT.shared, f"--config.train.num_steps={STEPS}", f"--config.checkpoint.every_steps={STEPS}"),
    seeds=(9, 10, 11),
)

if __name__ == "__main__":
    main(STUDY)
