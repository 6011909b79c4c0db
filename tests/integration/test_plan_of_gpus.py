"""Plans for GPUs: what a module and kernels say of their time, and a plan end to end."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dar_jax import planning, routing
from dar_jax.planning import gpus
from tests.gpu_compiler import needs_gpu_compiler

ROOT = pathlib.Path(__file__).parents[2]

GPU_MODULE = """HloModule jit_step, is_scheduled=true

%product_computation (p0: bf16[64,32], p1: bf16[32,128]) -> bf16[64,128] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,128]{1,0} parameter(1)
  ROOT %dot = bf16[64,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%nested (q0: bf16[64,32], q1: bf16[32,128]) -> bf16[64,128] {
  %q0 = bf16[64,32]{1,0} parameter(0)
  %q1 = bf16[32,128]{1,0} parameter(1)
  ROOT %inner = bf16[64,128]{1,0} fusion(%q0, %q1), kind=kCustom, calls=%product_computation
}

%added (r0: bf16[64,128]) -> bf16[64,128] {
  %r0 = bf16[64,128]{1,0} parameter(0)
  ROOT %sum = bf16[64,128]{1,0} add(%r0, %r0)
}

%body (carry: (s32[], bf16[64,32], bf16[32,128])) -> (s32[], bf16[64,32], bf16[32,128]) {
  %carry = (s32[], bf16[64,32]{1,0}, bf16[32,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %a = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %b = bf16[32,128]{1,0} get-tuple-element(%carry), index=2
  %gemm = bf16[64,128]{1,0} fusion(%a, %b), kind=kCustom, calls=%nested, \
backend_config={"reification_cost":[{"exec_time_us":7000,"name":"sol"}]}
  %loop = bf16[64,128]{1,0} fusion(%gemm), kind=kLoop, calls=%added, \
backend_config={"reification_cost":[{"exec_time_us":90,"name":""},{"exec_time_us":2.5e+1,"name":"sol"}]}
  %call = bf16[64,128]{1,0} custom-call(%loop), custom_call_target="__gpu$xla.gpu.triton"
  %cublas = (bf16[64,128]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}},\
"reification_cost":[{"exec_time_us":7000,"name":"sol"}]}
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[32,128]{1,0}) tuple(%i, %a, %b)
}

%condition (c: (s32[], bf16[64,32], bf16[32,128])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}, bf16[32,128]{1,0}) parameter(0)
  ROOT %done = pred[] constant(true)
}

ENTRY %main (x: (s32[], bf16[64,32], bf16[32,128])) -> (s32[], bf16[64,32], bf16[32,128]) {
  %x = (s32[], bf16[64,32]{1,0}, bf16[32,128]{1,0}) parameter(0)
  ROOT %while = (s32[], bf16[64,32]{1,0}, bf16[32,128]{1,0}) while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


@pytest.mark.parametrize("bandwidth", [1e9, 1e15])
def test_a_roofline_is_read_from_a_module_for_gpus(bandwidth):
    """Matmuls take the larger of FLOPs and bytes, not the compiler's figure; other fusions take its last one."""
    gpu = gpus.GPUS["h100"]._replace(bandwidth=bandwidth)
    schedule = planning.read_schedule(GPU_MODULE, gpu)
    product = max(2 * 64 * 32 * 128 / 989e12, 2 * (64 * 32 + 32 * 128 + 64 * 128) / bandwidth)
    assert schedule.seconds == pytest.approx(5 * (2 * product + 25e-6), rel=1e-6)
    assert (schedule.kernel_calls, schedule.kernel_seconds, schedule.unknown_loops) == (5, 0, 0)


def test_kernels_of_gpus_declare_the_history_that_they_read():
    """By the mean of its filled rows: each way reads it once, and the one back writes its cotangent."""
    k, b, t, d, mean = 6, 2, 8, 256, 2.5

    def gradient(u, sources):
        how = routing.Execution(mean_count=mean)
        inv_rms = routing.inverse_rms(sources)
        (h,), log_sum = routing.read(how, (u,), sources, inv_rms, jnp.int32(k))
        return jnp.sum(h.astype(jnp.float32)) + jnp.sum(log_sum)

    u, sources = jnp.zeros((b, 1, d)), jax.ShapeDtypeStruct((k, b, t, d), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(gradient, (0, 1)))(u, sources).jaxpr
    seconds = planning.count_kernel_seconds(jaxpr, "cuda", 1.0, bandwidth=1.0)
    rows, outputs = 1 + 2, 1 + 2  # of the forward pass, and of the cotangents, of which those of queries are float32
    assert seconds == pytest.approx(2 * b * t * d * (rows * mean + outputs) + 4 * b * d, rel=0.06)
    assert planning.count_kernel_seconds(jaxpr, "cpu", 1.0, bandwidth=1.0) == 0


@needs_gpu_compiler
def test_plan_of_gpus(tmp_path):
    """Memory, collectives and a roofline, between chips not. Flags as the launch scripts set them compile."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "dar_jax.plan", f"--config={ROOT}/configs/digits.py:static_t", f"--json={out}"]
    command += ["--topology=h100:2,h100:1*2", "--config.model.dtype=bfloat16", "--config.model.depth=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for plan in json.loads(out.read_text()):
        assert plan["devices"] == 2 and plan["fits"] and 0 < plan["mfu"] < 1 and plan["traffic_ms"] is None
        assert plan["kernel_calls"] > 0 and 0 < plan["estimated_kernel_ms"] < plan["estimated_step_ms"]
        assert plan["hbm_capacity_bytes"] == int(0.75 * 84_942_979_072)
        assert plan["collectives"]["all-reduce"]["bytes"] > plan["memory_bytes"]["params"] / 2
