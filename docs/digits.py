"""Draws docs/digits.png, the picture in the README, from a digits run and its diagnosis.

    python -m dar_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m dar_jax.diagnose --workdir=runs/digits --out=diagnosis
    python docs/digits.py --workdir=runs/digits --diagnosis=diagnosis

The left panel shows the latest sample grid, without its last rows. The maps show the mean weights at the first and at
the last time of the diagnosis.
"""

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "The run")
DIAGNOSIS = flags.DEFINE_string("diagnosis", "diagnosis", "What dar_jax.diagnose --out wrote for it")


def main(_):
    samples = plt.imread(sorted(pathlib.Path(WORKDIR.value, "samples").glob("*.png"))[-1])
    run = json.loads(pathlib.Path(DIAGNOSIS.value, "diagnosis.json").read_text())["runs"][0]
    weights = np.where(run["is_source"], run["weights"], np.nan)  # [times, readers, sources]
    plt.rcParams.update({"font.size": 8, "figure.constrained_layout.use": True})
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), width_ratios=(1.45, 1, 1))
    axes[0].imshow(samples[: int(0.6 * len(samples))], cmap="gray")  # six rows of ten
    axes[0].set_title("samples, one column per class")
    axes[0].set_axis_off()
    readers = weights.shape[1]
    for ax, at, name in ((axes[1], 0, "in noise, t = 0"), (axes[2], -1, "near the image, t = 1")):
        extent = (-0.5, readers - 0.5, 0.5, readers + 0.5)
        image = ax.imshow(weights[at], origin="lower", vmin=0, vmax=0.8, extent=extent)
        ax.set(title=f"read {name}", xlabel="source (0 = input)")
        ax.set_xticks(range(0, readers, 4))
        ax.set_yticks([1, 5, 9, readers], ["1", "5", "9", "head"])
    axes[1].set_ylabel("reader (sublayer)")
    figure.colorbar(image, ax=axes[2], label="mean weight")
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    app.run(main)
