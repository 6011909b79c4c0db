"""The flags of launch/xla_flags.sh exist in the installed compilers, which end the program at an unknown one."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def flags(array):
    script = f'source launch/xla_flags.sh; printf "%s\\n" "${{{array}[@]}}"'
    return subprocess.run(["bash", "-c", script], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()


def run(code, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **env}
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=300)


def test_gpu_flags_are_known_to_jax():
    """The CPU's jaxlib reads the flags of all platforms."""
    code = "import jax; jax.numpy.zeros(1)"
    result = run(code, XLA_FLAGS=" ".join(flags("gpu_flags")))
    assert result.returncode == 0, result.stderr
    assert run(code, XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0


# The gradient of a scan over layers whose weights are split over four chips, as with config.mesh.fsdp: prints how many
# parts of gathers the compiler has fused with matmuls.
OVERLAP = textwrap.dedent("""
    import os
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    import jax
    from jax import numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    import numpy as np

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
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
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[plan]"'
)


@needs_libtpu
def test_tpu_flags_are_known_to_libtpu_and_gathers_overlap():
    result = run(OVERLAP, LIBTPU_INIT_ARGS=" ".join(flags("tpu_flags")))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("flag", [flag for flag in flags("tpu_flags") if flag.endswith("=true")])
def test_every_tpu_flag_is_needed(flag):
    result = run(OVERLAP, LIBTPU_INIT_ARGS=" ".join([*flags("tpu_flags"), flag.replace("=true", "=false")]))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 0


@needs_libtpu
@pytest.mark.slow
def test_unknown_tpu_flag_ends_the_program():
    assert run(OVERLAP, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true").returncode != 0
