"""Plans a run: python -m dar_jax.plan --config=configs/sit_xl_dar.py --topology=v5e:4x4

Compiles the train step for hardware that need not be here, and prints the memory it takes, whether it fits, and the
compiler's estimate of its time. A TPU topology needs libtpu (pip install -e ".[plan]") and minutes; cpu:8 does not.
GPUs, h100:8, need XLA's compiler for them (pip install -e ".[plan_gpu]"), and their time is a roofline.
"""

import dataclasses
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from dar_jax import cli, files

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
TOPOLOGY = flags.DEFINE_list(
    "topology", None, "v5e:4x4, v6e:4x4, v4:4x4x4, v5p:2x4x4, v5e:16x16*2 (two slices), h100:8, h200:8, a100:8, "
    "h100:8*4 (four hosts) or cpu:8, in other sizes too. "
    "Several are compared in a table, each with as many microbatches as the step needs to fit"
)  # fmt: skip
JSON = flags.DEFINE_string("json", None, "Also write the plan, or the list of plans, to this file")
FIT = flags.DEFINE_bool("fit", False, "Take as many microbatches as the step needs to fit, as of several topologies")
PLOT = flags.DEFINE_string("plot", None, "Of several topologies: draw speed and memory to this .png")
GPU_FLAGS = pathlib.Path(__file__).with_name("planning") / "gpu_xla_flags.txt"
TPU_FLAGS = pathlib.Path(__file__).with_name("planning") / "tpu_xla_flags.txt"


def main(_):
    cli.require_flags(config=CONFIG.value, topology=TOPOLOGY.value)
    if JSON.value is not None:
        files.check_output(JSON.value, "--json")
    if PLOT.value is not None:
        files.check_output(PLOT.value, "--plot", ".png")
    _set_environment(TOPOLOGY.value)
    from dar_jax import planning
    from dar_jax.validate import validate

    validate(CONFIG.value)
    for topology in TOPOLOGY.value:
        planning.parse_topology(topology)
    several = len(TOPOLOGY.value) > 1
    make = planning.make_fitting_plan if several or FIT.value else planning.make_plan
    plans = []
    for topology in TOPOLOGY.value:
        plans.append(make(CONFIG.value, topology))
        print(planning.report(plans[-1]), end="\n\n" if several else "\n", flush=True)
    if several:
        print(planning.table(plans))
    if JSON.value is not None:
        found = [dataclasses.asdict(plan) for plan in plans]
        files.write_json(JSON.value, found if several else found[0], indent=2)
        print(f"wrote {JSON.value}")
    if PLOT.value is not None:
        planning.plot({"": plans}, PLOT.value)
        print(f"wrote {PLOT.value}")


def _set_environment(topologies: list[str]) -> None:
    """What jax and libtpu read when they start: run on the host, as many devices as asked for, look for no TPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sizes = [int(name[4:]) for name in topologies if name.startswith("cpu:") and name[4:].isdecimal()]
    if sizes:
        flag = f"--xla_force_host_platform_device_count={max(sizes)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    tpu_flags = [line for line in TPU_FLAGS.read_text().splitlines() if line.startswith("--")]  # as launch/ sets them
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*tpu_flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened, so plans may run side by side
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_WORKER_ID"] = "0"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-16"
    from dar_jax.planning import gpus

    if any(name.partition(":")[0] in gpus.GPUS for name in topologies):  # XLA reads its flags when jax first compiles
        gpu_flags = [line for line in GPU_FLAGS.read_text().splitlines() if line.startswith("--")]
        os.environ["XLA_FLAGS"] = " ".join([*gpu_flags, *gpus.flags(), os.environ.get("XLA_FLAGS", "")]).strip()


if __name__ == "__main__":
    cli.run(main)
