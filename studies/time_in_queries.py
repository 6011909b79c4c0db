"""Does routing use the time? The loss of the runs of studies/does_it_help.py with t shuffled in their queries alone.

Each query sees the time of another image, and all else the right one, on the same 512 held-out images and noises at
five times. If time in the queries mattered, the loss would rise. Run studies/does_it_help.py first. The results are
kept in studies/time_in_queries.json, from which the table is printed again without --root.

    python studies/time_in_queries.py --root=runs/does_it_help
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app
from does_it_help import STUDY
from study import ROOT, STUDIES
from study_tables import best_name, interval

CELLS, KEPT = ("static", "static_t", "gated_t"), STUDIES / "time_in_queries.json"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(root: pathlib.Path) -> dict:
    """{cell: {seed: {"loss", "shuffled": by time, "sources": {position: loss without the source over the loss}}}}."""
    curves, found = json.loads((STUDIES / f"{STUDY.name}.json").read_text())["curves"], {}
    for cell in CELLS:
        name = best_name(STUDY, curves, cell)
        for seed in curves[name]:
            out = root / f"{name}_{seed}" / "diagnosis"
            command = [sys.executable, "-m", "dar_jax.diagnose", f"--workdir={out.parent}", f"--out={out}", "--ablate"]
            command += ["--num_images=512", f"--timesteps={','.join(map(str, TIMES))}"]
            if not (out / "diagnosis.json").exists():
                subprocess.run(command, check=True)
            (run,) = json.loads((out / "diagnosis.json").read_text())["runs"]
            ablations, whole = run["ablations"], np.mean(run["loss"])
            without = np.mean(ablations["loss_without"], axis=0) / whole
            found.setdefault(cell, {})[seed] = {
                "loss": [round(x, 5) for x in run["loss"]],
                "shuffled": [round(x, 5) for x in ablations["loss_shuffled_t"]],
                "sources": {str(k): round(x, 4) for k, x in zip(ablations["sources"], without, strict=True)},
            }
    return found


def table(kept: dict) -> str:
    """By cell the loss, what shuffling adds to it, and the worth of sources, with intervals over seeds, as Markdown."""
    rows = ["| cell | runs | loss | shuffled t - loss | most at one time | without v_0 | without the costliest other |"]
    rows.append("|---" * 7 + "|")
    for cell, seeds in kept.items():
        losses, shuffled = (np.array([one[key] for one in seeds.values()]) for key in ("loss", "shuffled"))
        first = [one["sources"]["0"] for one in seeds.values()]
        others = [max(x for k, x in one["sources"].items() if k != "0") for one in seeds.values()]
        added, most = shuffled - losses, np.max(np.mean(shuffled - losses, axis=0))
        columns = [losses.mean(1), added.mean(1)], [first, others]
        texts = [["{:.4f} ± {:.4f}".format(*interval(x)) for x in part] for part in columns]
        texts[1] = [f"{np.mean(x):.3f} x" for x in columns[1]]
        rows.append(f"| `{cell}` | {len(seeds)} | {' | '.join(texts[0])} | {most:+.4f} | {' | '.join(texts[1])} |")
    return "\n".join(rows)


def main(_):
    if ROOT.value:
        KEPT.write_text(json.dumps(measure(pathlib.Path(ROOT.value)), indent=1) + "\n")
    if not KEPT.exists():
        sys.exit(f"error: {KEPT} is not there; name the directory of the runs with --root.")
    print(table(json.loads(KEPT.read_text())))


if __name__ == "__main__":
    app.run(main)
