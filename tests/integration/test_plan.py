"""The planner: its reading of a scheduled module, its count of FLOPs, and plans end to end."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dar_jax import config as config_lib
from dar_jax import planning
from dar_jax.errors import UserError
from dar_jax.planning import gpus
from tests.libtpu import needs_libtpu

ROOT = pathlib.Path(__file__).parents[2]
KEYS = {
    "devices", "hbm_argument_bytes", "hbm_temp_bytes", "hbm_total_bytes", "hbm_capacity_bytes", "fits",
    "flops_per_step", "estimated_step_ms", "estimated_kernel_ms", "compile_seconds",
}  # fmt: skip
CHIP = planning.Chip(hbm_bytes=2**30, hbm_bandwidth=1000.0, peak_flops=10.0, clock=1e3, ici_bandwidth=1.0, axes=2)

# The notation of a scheduled TPU module: an outer loop whose condition holds its length, 3, around a fusion and an
# inner loop of known length, 5, around a kernel; a fusion with cycles whose inside must not count again; an
# asynchronous all-gather that the text shows twice; a reduce-scatter; a conditional.
MODULE = """HloModule jit_step, is_scheduled=true

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused.1 (p.1: f32[8,16]) -> f32[8,16] {
  %p.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,16]{1,0:T(8,128)S(1)} add(%p.1, %p.1), backend_config={"window_config":{"estimated_cycles":"7000"}}
}

%gather_start (p.2: bf16[8,16]) -> bf16[16,16] {
  %p.2 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=4, dimensions={0}
}

%gather_beside (p.3: bf16[8,16]) -> bf16[16,16] {
  %p.3 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=4, dimensions={0}
}

%all-reduce-scatter.1 (p.4: f32[16]) -> f32[8] {
  %p.4 = f32[16]{0} parameter(0)
  %all-reduce.1 = f32[16]{0} all-reduce(%p.4), channel_id=5, to_apply=%sum
  ROOT %slice.1 = f32[8]{0} slice(%all-reduce.1), slice={[0:8]}
}

%inner_body (p.5: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.5 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x.1 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.5), index=1
  %k.1 = f32[8,16]{1,0:T(8,128)} custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={op_name="a(b)"}, backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"40","transcendentals":"7","bytes_accessed":"2000"}}}
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.5), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%i.1, %k.1)
}

%inner_condition (p.6: (s32[], f32[8,16])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %i.2), direction=LT
}

%outer_body (p.7: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.7 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x.2 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.7), index=1
  %fusion.1 = f32[8,16]{1,0:T(8,128)S(1)} fusion(%x.2), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"100"}}
  %async-start = bf16[16,16]{1,0:T(8,128)(2,1)} fusion(%fusion.1), kind=kCustom, calls=%gather_start
  %async.1 = bf16[16,16]{1,0:T(8,128)(2,1)} fusion(%fusion.1), kind=kCustom, calls=%gather_beside, backend_config={"window_config":{"estimated_cycles":"20"}}
  ROOT %while.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/f32[8]{0}) while(%p.7), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
}

%outer_condition (p.8: (s32[], f32[8,16])) -> pred[] {
  %p.8 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %length = s32[]{:T(128)} constant(3)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.8), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.3, %length), direction=LT
}

%cheap (p.9: f32[8]) -> f32[8] {
  ROOT %p.9 = f32[8]{0} parameter(0)
}

%costly (p.10: f32[8]) -> f32[8] {
  %p.10 = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p.10), backend_config={"window_config":{"estimated_cycles":"9"}}
}

ENTRY %main (a: f32[8,16], b: f32[16]) -> f32[8] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = f32[16]{0} parameter(1)
  %i.4 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%i.4, %a)
  %while.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%tuple.2), condition=%outer_condition, body=%outer_body
  %k.2 = pred[3]{0} custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"}}
  %k.3 = f32[16]{0} custom-call(%b), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"500","transcendentals":"0","bytes_accessed":"1"}}}
  %scatter = f32[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %choice = f32[8]{0} conditional(%i.4, %scatter, %scatter), branch_computations={%cheap, %costly}
}
"""  # noqa: E501


def test_schedule_sums_the_call_tree_with_trip_counts():
    schedule = planning.read_schedule(MODULE, CHIP)
    assert schedule.seconds == pytest.approx((3 * (100 + 20) + 9) / CHIP.clock)
    # In the loops 40 FLOPs at 10 a second take longer than 2000 bytes at 1000 a second.
    undeclared = (8 * 16 * 4 + 16 * 4 + 3) / 1000
    assert schedule.kernel_seconds == pytest.approx(15 * 4 + undeclared + 500 / 10)
    assert (schedule.kernel_calls, schedule.undeclared_kernels) == (17, 1)
    assert schedule.collectives == {
        "all-gather": {"count": 3, "bytes": 3 * 16 * 16 * 2},
        "reduce-scatter": {"count": 1, "bytes": 64},
    }
    assert schedule.unknown_loops == 0


def test_kernels_are_bound_by_bytes_where_these_take_longer():
    fast = CHIP._replace(peak_flops=1e6)
    undeclared = (8 * 16 * 4 + 16 * 4 + 3) / 1000
    assert planning.read_schedule(MODULE, fast).kernel_seconds == pytest.approx(15 * 2 + undeclared + 0.001)


def test_loop_of_unknown_length_counts_once_and_is_reported():
    schedule = planning.read_schedule(MODULE.replace("s32[]{:T(128)} constant(3)", "s32[]{:T(128)} parameter(1)"), CHIP)
    assert schedule.seconds == pytest.approx((100 + 20 + 9) / CHIP.clock)
    assert schedule.unknown_loops == 1


# A loop that multiplies with the parts of a matrix as they come in: it counts by 2 to 8, sends one part each time, and
# runs beside an all-gather that began before it.
WINDOWED = """HloModule jit_step, is_scheduled=true

%gather_start (p.1: bf16[8,16]) -> bf16[16,16] {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=4, dimensions={0}
}

%gather_beside (p.2: bf16[8,16]) -> bf16[16,16] {
  %p.2 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=4, dimensions={0}
}

%body (p.3: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %p.3 = (bf16[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %seven = u32[]{:T(128)} constant(7)
  %part = bf16[8,16]{1,0} get-tuple-element(%p.3), index=0
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.3), index=1
  %other = u32[]{:T(128)} add(%i.1, %seven)
  %next = u32[]{:T(128)} add(%i.1, %two)
  %sent = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) collective-permute-start(%part), channel_id=5
  %beside = bf16[16,16]{1,0} fusion(%part), kind=kCustom, calls=%gather_beside
  %got = bf16[8,16]{1,0} collective-permute-done(%sent)
  ROOT %tuple.1 = (bf16[8,16]{1,0}, u32[]{:T(128)}) tuple(%got, %next)
}

%condition (p.4: (bf16[8,16], u32[])) -> pred[] {
  %p.4 = (bf16[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %end = u32[]{:T(128)} constant(8)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.4), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %end), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> (bf16[8,16], u32[]) {
  %a = bf16[8,16]{1,0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %begun = bf16[16,16]{1,0} fusion(%a), kind=kCustom, calls=%gather_start
  %tuple.2 = (bf16[8,16]{1,0}, u32[]{:T(128)}) tuple(%a, %zero)
  ROOT %while.1 = (bf16[8,16]{1,0}, u32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%body
}
"""


def test_loop_that_counts_by_more_than_one():
    schedule = planning.read_schedule(WINDOWED, CHIP)
    assert schedule.unknown_loops == 0
    assert schedule.collectives == {
        "all-gather": {"count": 1, "bytes": 16 * 16 * 2},
        "collective-permute": {"count": 4, "bytes": 4 * 8 * 16 * 2},
    }


def test_flops_follow_scans_branches_and_recomputation():
    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = 2 * 4 * 8 * 8

    def layer(x, w):
        return jnp.sin(jnp.cos(x) @ w)

    def scanned(x, w):
        return jax.lax.scan(lambda h, _: (jax.checkpoint(layer)(h, w), None), x, None, length=5)[0].sum()

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: layer(layer(x, w), w), lambda: layer(x, w))

    def count(f):
        return planning.count_flops(jax.make_jaxpr(f)(x, w).jaxpr)

    assert count(scanned) == 5 * one
    assert count(jax.grad(scanned, argnums=(0, 1))) == 5 * 4 * one  # forward, recomputed, two backward
    assert count(branched) == 2 * one


@pytest.mark.parametrize("variant", ["residual", "static_t", "dynamic"])
def test_model_flops_of_xl_are_the_published_ones(variant):
    """118.64 GFLOPs (multiply-adds) for one image of DiT-XL/2, whose SiT differs by the 8 output channels only."""
    from dar_jax import models

    config = config_lib.route(config_lib.default(), variant)
    config.model.update(input_size=32, channels=4, num_classes=1000, **config_lib.SIZES["XL"])
    model = models.build(config.model)
    image, t, y = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image, t, y))
    # Of the plain form: a TPU's attention counts the lanes that it fills.
    flops = planning.count_flops(jax.make_jaxpr(model.apply)(params, image, t, y).jaxpr, "cpu")
    routing = 57 * 2 * 256 * 1152**2 if variant == "dynamic" else 0  # the queries' projections
    assert flops - routing == pytest.approx(2 * 118.64e9, rel=6e-3)


def tiny(variant="static_t", **train):
    config = config_lib.route(config_lib.default(), variant)
    config.data.update(source="synthetic", image_size=32)
    config.model.update(input_size=32, channels=4, depth=2, hidden_size=128, num_heads=2)
    config.train.update(batch_size=16, **train)
    return config


@pytest.fixture(scope="module")
def cpu_plan():
    return planning.make_plan(tiny(), "cpu:8")


def test_arguments_are_four_copies_of_the_parameters_and_the_batch(cpu_plan):
    hidden, depth, patch = 128, 2, 16
    block = (3 + 1 + 4 + 4 + 6) * hidden**2 + (3 + 1 + 4 + 1 + 6) * hidden
    ends = patch * hidden + hidden + hidden * patch + patch + 2 * hidden**2 + 2 * hidden  # patches in and out
    embedders = 256 * hidden + hidden + hidden**2 + hidden + 11 * hidden
    routing = (2 * depth + 1) * 2 * hidden  # w and the norm's scale
    params = 4 * (depth * block + ends + embedders + routing)
    counters = 3 * 4  # of the state, of Adam and of its schedule
    batch = 16 // 8 * (32 * 32 * 4 * 4 + 4)
    assert cpu_plan.hbm_argument_bytes == 4 * params + counters + batch


def test_plan_of_host_devices(cpu_plan):
    assert set(dataclasses.asdict(cpu_plan)) >= KEYS
    assert cpu_plan.devices == 8
    assert cpu_plan.fits and cpu_plan.hbm_total_bytes <= cpu_plan.hbm_capacity_bytes
    assert cpu_plan.hbm_total_bytes >= cpu_plan.hbm_argument_bytes + cpu_plan.hbm_temp_bytes > 0
    assert cpu_plan.estimated_step_ms is None and cpu_plan.estimated_kernel_ms is None and cpu_plan.mfu is None
    # Every gradient crosses the devices, as float32: one copy of the parameters, and the scalars of the metrics.
    gradient = (cpu_plan.hbm_argument_bytes - 2 * (32 * 32 * 4 * 4 + 4)) / 4
    assert cpu_plan.collectives["all-reduce"]["bytes"] == pytest.approx(gradient, rel=0.02)
    assert cpu_plan.model_flops_per_step < cpu_plan.flops_per_step < 1.5 * cpu_plan.model_flops_per_step
    assert cpu_plan.compile_seconds > 0
    assert cpu_plan.suggested_batch_size % 8 == 0
    assert planning.report(cpu_plan).count("\n") > 8


def test_memory_by_kind_adds_up(cpu_plan):
    kinds = cpu_plan.memory_bytes
    assert sum(kinds.values()) == cpu_plan.hbm_total_bytes
    assert kinds["params"] == kinds["ema"] == pytest.approx(kinds["optimizer"] / 2, rel=1e-4)
    assert kinds["history"] == 2 * 2 * (2 * 256 * 128) * 4  # rows, and cotangents, of two samples
    split = planning.make_plan(with_mesh(tiny(), fsdp=2, tensor=2), "cpu:8").memory_bytes
    assert kinds["params"] / 3.5 > split["params"] > kinds["params"] / 4.5
    assert split["history"] == kinds["history"]  # twice the samples, half of the tokens


def with_mesh(config, **sizes):
    config.mesh.update(sizes)
    return config


def test_batch_that_does_not_fit_is_cut_into_microbatches(cpu_plan, monkeypatch):
    """What is suggested fits half of the batch, and half is what the second compile gets."""
    compiled = []

    def make(config, topology):
        compiled.append(config.train.accumulate_steps)
        fits = len(compiled) > 1
        fields = {"accumulate_steps": compiled[-1], "fits": fits, "suggested_batch_size": 16 if fits else 8}
        return dataclasses.replace(cpu_plan, mesh={"data": 4, "fsdp": 1, "tensor": 2}, **fields)

    monkeypatch.setattr(planning.plan, "make_plan", make)
    config = tiny()
    assert planning.make_fitting_plan(config, "cpu:8").accumulate_steps == 2
    assert compiled == [1, 2] and config.train.accumulate_steps == 1


def test_plan_that_the_compiler_refuses(cpu_plan, monkeypatch):
    """The message is libtpu's (0.0.52); its figure holds the arguments as well."""
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    )

    def refuse(lowered):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    plan = planning.make_plan(tiny(), "cpu:8")
    assert not plan.fits
    assert plan.hbm_total_bytes == 24 * 2**30 == plan.hbm_argument_bytes + plan.hbm_temp_bytes
    assert plan.hbm_argument_bytes == cpu_plan.hbm_argument_bytes
    assert plan.estimated_step_ms is None and plan.flops_per_step == cpu_plan.flops_per_step
    assert "no" in planning.report(plan)


def test_suggestion_fits_and_is_the_largest():
    # 4 images per chip on 8 chips: 100 bytes of gradient and 10 per image.
    suggest = planning.suggest_batch_size
    assert suggest(32, 8, available=170, temporaries=140, gradient=100) == 8 * 7
    assert suggest(32, 8, available=299, temporaries=140, gradient=100) == 8 * 16  # 19 images, in eights
    assert suggest(32, 8, available=109, temporaries=140, gradient=100) is None
    assert (
        suggest(32, 8, available=35, temporaries=40, gradient=100) == 8 * 3
    )  # no room for a whole gradient: all grows


def test_door_writes_every_key(tmp_path):
    """A process of its own, because the door chooses the number of devices before jax starts."""
    out = tmp_path / "plan.json"
    fields = {
        "model.depth": 2, "model.hidden_size": 32, "model.num_heads": 2, "train.batch_size": 6, "mesh.fsdp": 2,
        "model.routing.kind": "residual",
    }  # fmt: skip
    command = [sys.executable, "-m", "dar_jax.plan", f"--config={ROOT}/configs/digits.py", "--topology=cpu:2"]
    command += [f"--config.{name}={value}" for name, value in fields.items()] + [f"--json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert set(plan) >= KEYS
    assert (plan["devices"], plan["batch_size"]) == (2, 6)
    assert "all-gather" in plan["collectives"]  # of the parameters that fsdp splits
    assert "memory per device" in done.stdout and str(out) in done.stdout


def test_door_compares_topologies(tmp_path):
    json_path, picture = tmp_path / "plans.json", tmp_path / "plans.png"
    fields = {"model.depth": 2, "model.hidden_size": 32, "model.num_heads": 2, "train.batch_size": 8}
    command = [sys.executable, "-m", "dar_jax.plan", f"--config={ROOT}/configs/digits.py:residual"]
    command += ["--topology=cpu:2,cpu:4", f"--json={json_path}", f"--plot={picture}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [plan["devices"] for plan in json.loads(json_path.read_text())] == [2, 4]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("topology", "cpu"))][-3:]
    assert [line[:2] for line in table[1:]] == [["cpu:2", "2x1x1"], ["cpu:4", "4x1x1"]]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:4x4x4", "v4:4x4", "cpu:0", "v9:4x4", "v5e:4x4*0", "cpu:8*2", "h100", "h100:4x4", ""]
)
def test_unknown_topology_names_the_forms(topology):
    with pytest.raises(UserError, match=r"valid forms.*v5e:4x4.*v4:4x4x4.*cpu:8"):
        planning.make_plan(tiny(), topology)


@pytest.mark.parametrize("topology", ["cpu:1000000", "cpu:513", "v5e:100000x100000", "v5e:16x16*100000"])
def test_topology_that_nobody_has_is_refused_at_once(topology):
    with pytest.raises(UserError, match="is too large; at most 65536 chips or 512 host devices"):
        planning.parse_topology(topology)


def test_config_is_checked_as_for_training():
    with pytest.raises(UserError, match=r"accumulate_steps = 4 must be divisible by the 8 devices"):
        planning.make_plan(tiny(accumulate_steps=4), "cpu:8")
    with pytest.raises(UserError, match="host devices"):
        planning.make_plan(tiny(), "cpu:16")


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[plan\]"'):
        planning.make_plan(tiny(), "v5e:4x4")


def test_missing_compiler_of_gpus_names_the_extra(monkeypatch):
    monkeypatch.setattr(gpus, "compiler", lambda: None)
    assert planning.parse_topology("h100:8*4") == ("h100", (8,), 4)
    with pytest.raises(UserError, match=r'pip install -e "\.\[plan_gpu\]"'):
        planning.make_plan(tiny(), "h100:8")


@pytest.mark.slow
@needs_libtpu
def test_plan_of_a_tpu(tmp_path):
    out = tmp_path / "plan.json"
    fields = {"model.depth": 2, "model.hidden_size": 128, "model.num_heads": 2, "model.dtype": "bfloat16"}
    command = [sys.executable, "-m", "dar_jax.plan", f"--config={ROOT}/configs/digits.py:residual", f"--json={out}"]
    command += ["--topology=v5e:2x2", *(f"--config.{name}={value}" for name, value in fields.items())]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert set(plan) >= KEYS
    assert plan["devices"] == 4 and plan["fits"]
    assert plan["hbm_capacity_bytes"] == 16 * 2**30
    assert plan["estimated_kernel_ms"] == 0 and plan["unknown_loops"] == 0
    assert 0 < plan["mfu"] < 1
    assert math.isclose(
        plan["mfu"], plan["model_flops_per_step"] / (4 * 197e12 * plan["estimated_step_ms"] / 1e3), rel_tol=1e-6
    )
    assert plan["collectives"]["all-reduce"]["count"] > 0
