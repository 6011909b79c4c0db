"""Plans SiT-XL/2 at batch 1024, residual and routed, over TPU slices. Writes docs/plan.md, .json and .png.

    python benchmarks/plan_table.py

Needs the extra "plan" and no TPU. Every plan is a compile that takes minutes. The command can be stopped and repeated:
it leaves out the plans that are in docs/plan.json already. --fresh makes all plans again.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

FRESH = flags.DEFINE_bool("fresh", False, "Make all plans again")
ROOT = pathlib.Path(__file__).parents[1]
TOPOLOGIES = "v5e:4x4", "v5e:8x8", "v5e:16x16", "v4:4x4x4", "v5p:2x4x4"
VARIANTS = "residual", "static_t"


def make(variant: str, topology: str) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "plan.json"
        config = f"configs/sit_xl_dar.py:{variant}@{topology.split(':')[0]}"
        flags_ = ["--fit", f"--config={config}", f"--topology={topology}", f"--json={path}"]
        subprocess.run([sys.executable, "-m", "dar_jax.plan", *flags_], cwd=ROOT, check=True)
        return json.loads(path.read_text())


def main(_):
    store = ROOT / "docs" / "plan.json"
    plans = json.loads(store.read_text()) if store.exists() and not FRESH.value else {}
    for variant in VARIANTS:
        for topology in TOPOLOGIES:
            if topology not in plans.setdefault(variant, {}):
                plans[variant][topology] = make(variant, topology)
                store.write_text(json.dumps(plans, indent=1) + "\n")

    os.environ["JAX_PLATFORMS"] = "cpu"
    from dar_jax import planning

    groups = {name: [planning.Plan(**plan) for plan in found.values()] for name, found in plans.items()}
    slices = {name: [p for p in found if p.topology.startswith("v5e")] for name, found in groups.items()}
    planning.plot(slices, str(store.with_suffix(".png")))
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    text = [
        "# SiT-XL/2 at batch 1024, planned",
        "",
        f"Written by `python benchmarks/plan_table.py` on {datetime.date.today()} at commit {commit}.",
        "Memory is in GiB per chip, as the TPU compiler assigns it. Times are estimates of the compiler, not timings.",
        "`ms` leaves out the traffic between chips, and `traffic` is the least time that this traffic takes. `micro`",
        "is the number of microbatches with which the step fits. The mesh is data x fsdp x tensor.",
    ]
    for name, found in groups.items():
        text += ["", f"## {name}", "", "```text", planning.table(found), "```"]
    text += ["", "The v5e slices:", "", "![Estimated images per second and memory per chip over chips](plan.png)", ""]
    store.with_suffix(".md").write_text("\n".join(text))
    print(f"wrote {store.with_suffix('.md')}")


if __name__ == "__main__":
    app.run(main)
