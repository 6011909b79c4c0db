"""The flags in dar_jax/planning/*_xla_flags.txt exist in the installed compilers, which end at an unknown flag."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.libtpu import needs_libtpu

ROOT = pathlib.Path(__file__).parents[2]


def flags(platform):
    lines = (ROOT / "dar_jax" / "planning" / f"{platform}_xla_flags.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run(code, *args, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **env}
    return subprocess.run([sys.executable, "-c", code, *args], env=env, text=True, capture_output=True, timeout=300)


def test_gpu_flags_are_known_to_jax():
    """The CPU's jaxlib reads the flags of all platforms."""
    code = "import jax; jax.numpy.zeros(1)"
    result = run(code, XLA_FLAGS=" ".join(flags("gpu")))
    assert result.returncode == 0, result.stderr
    assert run(code, XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0


def test_planner_sets_the_tpu_flags_before_those_of_the_environment():
    code = "import os; from dar_jax import plan; plan._set_environment([]); print(os.environ['LIBTPU_INIT_ARGS'])"
    assert run(code, LIBTPU_INIT_ARGS="--mine=1").stdout.split() == [*flags("tpu"), "--mine=1"]


# The gradient of a scan over layers whose weights are split over four chips, as with config.mesh.fsdp: prints how many
# parts of gathers the compiler has fused with matmuls.
OVERLAP = textwrap.dedent("""
    import os, sys
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ.update(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    import jax
    from jax import numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    import numpy as np

    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
    mesh = Mesh(np.array(devices), ("fsdp",))

    def array(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(weights, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

    weights = array((None, None, "fsdp"), 4, 2, 2048, 2048)
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    print(gradient.lower(weights, array(("fsdp",), 4096, 2048)).compile().as_text().count("async_collective_fusion"))
""")


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("v4:2x2x1", "v6e:2x2")]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", *OTHERS])
def test_tpu_flags_are_known_to_libtpu_and_gathers_overlap(topology):
    result = run(OVERLAP, topology, LIBTPU_INIT_ARGS=" ".join(flags("tpu")))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0 or not topology.startswith("v5e")


@needs_libtpu
@pytest.mark.slow
def test_unknown_tpu_flag_ends_the_program():
    assert run(OVERLAP, "v5e:2x2", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true").returncode != 0
