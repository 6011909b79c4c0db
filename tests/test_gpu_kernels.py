"""The kernels of GPUs as ptxas makes them for an H100, which need not be there: spills and registers."""

import functools
import glob
import os
import pathlib
import re
import subprocess
import sys

from dar_jax.planning import gpus
from tests.gpu_compiler import needs_gpu_compiler

ROOT = pathlib.Path(__file__).parents[1]
# Of the passes over the history, queries and features; of the input of a sublayer, recent sources and features.
HISTORY = ((1, 1152), (4, 768), (4, 1152), (8, 1152), (14, 1152), (4, 2304), (8, 2304), (4, 3072), (8, 3072))
INPUTS = ((0, 1152), (1, 1152), (3, 1152), (7, 1152), (13, 1152), (3, 2304), (3, 3072))
SPILLED = {"cotangents_13_1152": 76}  # bytes of a thread: a chunk of 14 has more outputs than registers hold
HEADS = (64, 72, 128)  # features of a head
KERNELS = 4 * len(HISTORY) + 2 * len(INPUTS) + 4 * len(HEADS)


@needs_gpu_compiler
def test_kernels_do_not_spill_on_an_h100(tmp_path):
    """But one. Nor does any take more registers than two blocks of four warps, or one of 16, may have."""
    command = [sys.executable, "-m", "tests.test_gpu_kernels", str(tmp_path)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([f"--xla_dump_to={tmp_path}", *gpus.flags()]),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, _, _, _ in found}) == KERNELS
    assert not [line for line in found if int(line[2]) > SPILLED.get(line[0], 0)]
    assert all(int(registers) * int(threads) <= 65536 // (2 if int(threads) == 128 else 1)
               for _, registers, _, threads in found)  # fmt: skip


def compile_all(folder: str) -> None:
    """Prints name, registers of a thread, bytes that it spills, and threads, of every kernel."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dar_jax.models import attention_gpu
    from dar_jax.routing.kernels import gpu

    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=gpus.specification("h100"), topology="1x1x1"
    )
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    b, t, k = 2, 64, 15

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    def report(name, function, *args, entries=()):
        for path in glob.glob(f"{folder}/*"):
            os.remove(path)
        jax.jit(function).lower(*args).compile()
        for path in glob.glob(f"{folder}/*.ptx"):
            if ".entry" not in pathlib.Path(path).read_text():
                continue
            made = [gpus.compiler() / "bin" / "ptxas", "-v", "-arch=sm_90a", path, "-o", f"{path}.cubin"]
            said = subprocess.run(made, capture_output=True, text=True, check=True).stderr
            pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
            for entry, spilled, registers in re.findall(pattern, said, re.S):
                if any(one in entry for one in entries or (function.__name__,)):
                    threads = re.search(rf"{entry}\(.*?\.reqntid (\d+)", pathlib.Path(path).read_text(), re.S)[1]
                    print(name if not entries else f"{name}{entry}", registers, spilled, threads, flush=True)

    scalars, count = array(k, b, t, dtype=jnp.float32), array(dtype=jnp.int32)
    for q, d in HISTORY:
        u, rows, made = q * (array(b, 1, d),), array(k, b, t, d), q * (array(b, t, d),)
        sums = array(q, b, t, dtype=jnp.float32)
        report(f"forward_{q}_{d}", gpu.forward, u, rows, scalars, count)
        report(f"shared_{q}_{d}", gpu.cotangents, rows, u, rows, scalars, count, made, sums, made, sums)
        report(f"query_{q}_{d}", gpu.query_cotangent, made, rows, scalars, count, made, sums, made, sums)
        report(f"source_{q}_{d}", gpu.add_source_cotangent, rows, made, rows, scalars, count, sums, made, sums)
    for recent, d in INPUTS:
        values, u = (recent + 1) * (array(b, t, d),), (array(b, 1, d),) if recent else ()
        columns, modulation = (recent + 1) * (array(b, t, dtype=jnp.float32),), 2 * (array(b, 1, d),)
        args = u, values, columns, modulation
        report(f"input_{recent}_{d}", gpu.sublayer_input, *args)
        report(f"cotangents_{recent}_{d}", gpu.sublayer_input_cotangents, *args, (array(b, t, d),), values[1:])
    for d in HEADS:
        tokens, row = array(b, 1024, 2, d), array(b, 2, 1024, dtype=jnp.float32)
        qkv, joined, mask = array(b, 256, 3, 2 * d), array(b, 256, 2 * d), array(b, 256, dtype=bool)
        few = array(b, 2, 256, dtype=jnp.float32)
        entries = "_forward", "_backward_queries", "_backward_keys", "_backward_of_parts"
        long, of_parts = 4 * (tokens,), (qkv, mask)
        backward = lambda q, k, v, out, *rest: attention_gpu.backward(q, k, v, None, out, *rest)  # noqa: E731
        report(d, backward, *long, row, tokens, entries=entries)
        report(d, functools.partial(attention_gpu.forward_of_parts, d), *of_parts, entries=entries)
        backward = functools.partial(attention_gpu.backward_of_parts, d)
        report(d, backward, *of_parts, joined, few, joined, entries=entries)


if __name__ == "__main__":
    compile_all(sys.argv[1])
