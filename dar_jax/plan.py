"""Plans a run: python -m dar_jax.plan --config=configs/sit_xl_dar.py --topology=v5e:4x4

Compiles the train step for hardware that need not be here, and prints the memory it takes, whether it fits, and the
compiler's estimate of its time. A TPU topology needs libtpu (pip install -e ".[plan]") and minutes; cpu:8 does not.
"""

import dataclasses
import json
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from dar_jax import errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, and its variant: configs/digits.py:static_t")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v6e:4x4, v4:4x4x4, v5p:2x4x4 or cpu:8, in other sizes too")
JSON = flags.DEFINE_string("json", None, "Also write the plan to this file")


def main(_):
    errors.require_flags(config=CONFIG.value, topology=TOPOLOGY.value)
    if JSON.value and not pathlib.Path(JSON.value).absolute().parent.is_dir():
        raise errors.UserError(f'--json = "{JSON.value}" is in no directory; make it first.')
    _set_environment(TOPOLOGY.value)
    from dar_jax import planning

    plan = planning.make_plan(CONFIG.value, TOPOLOGY.value)
    print(planning.report(plan))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
        print(f"wrote {JSON.value}")


def _set_environment(topology: str) -> None:
    """What jax and libtpu read when they start: run on the host, as many devices as asked for, look for no TPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    kind, _, size = topology.partition(":")
    if kind == "cpu" and size.isdecimal():
        flag = f"--xla_force_host_platform_device_count={size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened, so plans may run side by side
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_WORKER_ID"] = "0"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-16"


if __name__ == "__main__":
    errors.run(main)
