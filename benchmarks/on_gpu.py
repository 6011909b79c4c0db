"""Checks every kernel on the GPU or TPU of this machine, and times what the docs only estimate. One command.

    python benchmarks/on_gpu.py --out=on_gpu

Needs jax, flax, optax, orbax-checkpoint, ml_collections and numpy: no data, no tensorflow. Where PyTorch with CUDA is
installed it is timed beside. Each part is a process of its own, which gives all memory back, and can be run alone, and
again: --parts=checks,steps. Every row is written to results.json in --out as soon as it is known, and page.md at the
end. All parts are meant to take less than 20 minutes on one H100. What each does:

  checks       kernels against plain autodiff in float32 on the same device; ends with exit code 1 if one is wrong
  aggregation  one aggregation of 15 and of 57 sources, forward and backward, against the plain form
  attention    over 256 tokens with heads of 72 features, and over 4,096 with heads of 128, against the plain form
  steps        train step and one evaluation for sampling, in bfloat16, with MFU, memory and the planner's estimate
  torch        the same of PyTorch: SiT with torch.compile, autocast and its fused attention, and the aggregation

--study=NAME trains the runs of studies/NAME.py instead, in NAME under --out. What follows "--" is the study's. Several
runs share one GPU. This needs grain too, and the study's data:

    python benchmarks/on_gpu.py --study=does_it_help -- --jobs=8 --minutes=9 --data=fashion-mnist

--smoke takes tiny shapes, so that the script itself can be tried on a CPU, where kernels are interpreted.
"""

import functools
import gc
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where dar_jax is not installed; tests.parity of PyTorch

PARTS = ("checks", "aggregation", "attention", "steps", "torch")
OUT = flags.DEFINE_string("out", "on_gpu", "Folder of results.json and page.md, in which parts are added up")
RUN = flags.DEFINE_list("parts", [*PARTS], "What to run")
BATCHES = {"S": 256, "B": 128, "L": 64, "XL": 64}  # images per step, of published sizes of SiT
SIZES = flags.DEFINE_list("sizes", [*BATCHES], "Sizes of SiT, patch 2, on latents of 32x32x4")
CASES = flags.DEFINE_list("cases", ["residual", "static_t:4", "dynamic:4", "static_t:1"], "As in step_time.py")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds, after one to warm up")
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny shapes, to try the script on a CPU")
STUDY = flags.DEFINE_string("study", None, "Train the runs of studies/<name>.py here, in the place of --parts")
PART = flags.DEFINE_enum("part", None, PARTS, "The part that this process runs; set by the script itself")

# What gives the planner's estimate for a GPU: the compiler notes its own figure for every fusion.
NOTES = "--xla_gpu_collect_cost_model_stats=true"


def seconds(call, calls: int = 10, wait=None) -> float:
    """Median over rounds of what a call takes on the device, when so many are given to it at once.

    `wait` returns when a result is there; None: of jax.
    """
    if wait is None:
        import jax

        wait = jax.block_until_ready
    calls, rounds = 1 if SMOKE.value else calls, []
    for _ in range(3):  # until all is compiled
        wait(call())
    for _ in range(ROUNDS.value):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()  # the memory of the one before goes back meanwhile
        wait(result)
        rounds.append((time.perf_counter() - start) / calls)
    return float(np.median(rounds))


def relative(found, expected) -> float:
    """The distance over the norm of what is expected, in float64; NaN is passed on."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def checks() -> Iterator[dict]:
    """Rows of {"check", "error", "bound"}: the largest relative error of outputs and cotangents of every kernel."""
    import jax
    import jax.numpy as jnp

    from dar_jax import routing
    from dar_jax.models import attention

    rng = np.random.default_rng(time.time_ns())  # fresh inputs every time
    how = routing.Execution("pallas")

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def compare(name, function, plain, inputs, dtype, bound):
        """Both ways on cotangents of random numbers; the plain form gets the same numbers in float32."""

        def both(f, inputs):
            out, vjp = jax.vjp(f, *inputs)
            leaves, tree = jax.tree.flatten(out)
            made = np.random.default_rng(0)
            g = [jnp.asarray(made.normal(size=x.shape), dtype).astype(x.dtype) for x in leaves]
            return leaves, jax.tree.leaves(vjp(jax.tree.unflatten(tree, g)))

        wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        with jax.default_matmul_precision("highest"):
            expected = jax.tree.leaves(jax.jit(functools.partial(both, plain))(wide))
        found = jax.tree.leaves(jax.jit(functools.partial(both, function))(inputs))
        errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
        return {"check": name, "error": max(errors, key=lambda e: (np.isnan(e), e)), "bound": bound}

    def read(count, u, sources):
        inv_rms = jax.lax.stop_gradient(routing.inverse_rms(sources))
        return routing.read(how, u, sources, inv_rms, jnp.int32(count))

    def plain_read(count, u, sources):
        filled = sources[:count]
        keys = filled * jax.lax.rsqrt(jnp.mean(jnp.square(filled), axis=-1, keepdims=True) + 1e-6)
        scores = jnp.stack([jnp.sum(q * keys, axis=-1) for q in u])  # [Q, K, B, T]
        weights = jax.nn.softmax(scores, axis=1)[..., None]
        return tuple(jnp.sum(weights * filled, axis=1)), jax.nn.logsumexp(scores, axis=1)

    b, t = (2, 16) if SMOKE.value else (4, 256)
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        for q, d, per_token in [(2, 128, False)] if SMOKE.value else [
            (1, 1152, False), (4, 384, False), (4, 768, False), (4, 1152, False), (8, 1152, False), (14, 1152, False),
            (4, 3072, False), (1, 1152, True), (4, 1152, True),
        ]:  # fmt: skip
            tokens = t if per_token else 1
            u = tuple(2 * d**-0.5 * normal(q, b, tokens, d, dtype=dtype))
            sources = (normal(6, b, t, d) * jnp.exp(0.5 * normal(6, b, t, 1))).astype(dtype)
            name = f"read, {q} queries{' of tokens' * per_token}, D {d}, {jnp.dtype(dtype)}"
            parts = functools.partial(read, 4), functools.partial(plain_read, 4)
            yield compare(name, *parts, (u, sources), dtype, bound)
        for recent, d in [(1, 128)] if SMOKE.value else [(0, 1152), (1, 1152), (3, 768), (3, 1152), (7, 1152)]:
            values = tuple(normal(recent + 1, b, t, d, dtype=dtype))
            inputs = 2 * d**-0.5 * normal(b, 1, d), values[0], normal(b, t), values[1:]
            inputs = *inputs, *(normal(2, b, 1, d, dtype=dtype))

            def sublayer(u, aggregate, log_sum, recent, shift, scale):
                inv_rms = tuple(jax.lax.stop_gradient(routing.inverse_rms(v)) for v in recent)
                return routing.sublayer_input(how, u, aggregate, log_sum, recent, inv_rms, shift, scale)[0]

            def plain_sublayer(u, aggregate, log_sum, recent, shift, scale):
                inv_rms = tuple(map(routing.inverse_rms, recent))
                h = routing.state(u, aggregate, log_sum, recent, inv_rms)
                centred = h - jnp.mean(h, axis=-1, keepdims=True)
                normalised = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
                return normalised * (1 + scale) + shift

            name = f"sublayer input, {recent} recent, D {d}, {jnp.dtype(dtype)}"
            yield compare(name, sublayer, plain_sublayer, inputs, dtype, bound)

    few = [(256, 64), (256, 72), (250, 72), (1024, 72), (1100, 128)]
    for (tokens, d), is_masked in itertools.product([(32, 24)] if SMOKE.value else few, (False, True)):
        x, key_mask = normal(2, tokens, 3, 2 * d, dtype=jnp.bfloat16), None
        if is_masked:
            key_mask = jnp.asarray(rng.random((2, tokens)) < 0.7)
        by_kernels, plain = (
            functools.partial(attention.self_attention, heads=2, key_mask=key_mask, attend=attend)
            for attend in (attention.attention, attention.by_autodiff)
        )
        name = f"attention{' with a mask' * is_masked}, {tokens} tokens, heads of {d}"
        yield compare(name, by_kernels, plain, (x,), jnp.bfloat16, 2e-2)
    yield from whole_models()


def whole_models() -> Iterator[dict]:
    """The gradient of a loss of a small SiT by kernels, beside that of its plain form in float32."""
    import jax
    import jax.numpy as jnp

    from dar_jax import config as config_lib
    from dar_jax import models

    size = 128 if SMOKE.value else 384
    for variant in ("residual",) if SMOKE.value else ("residual", "static", "static_t", "dynamic"):
        config = config_lib.route(config_lib.default(), variant)
        config.model.update(input_size=32, channels=4, num_classes=10, depth=4, hidden_size=size, num_heads=4)
        config.model.routing.chunk_size = 4
        x, t, label = jax.random.normal(jax.random.key(0), (2, 32, 32, 4)), jnp.array([0.2, 0.7]), jnp.array([1, 2])
        params, gradients = None, {}
        for plain, dtype in ((True, "float32"), (False, "bfloat16")):
            config.model.dtype = dtype
            model = models.build(config.model, plain=plain)
            if params is None:
                params = model.init(jax.random.key(1), x, t, {"label": label})["params"]
                flat, tree = jax.tree.flatten(params)
                keys = jax.random.split(jax.random.key(2), len(flat))  # else the gates and queries are zeros
                flat = [p + 0.02 * jax.random.normal(k, p.shape) for p, k in zip(flat, keys, strict=True)]
                params = jax.tree.unflatten(tree, flat)

            def loss(p, model=model, label=label, x=x, t=t):
                return jnp.sum(jnp.sin(model.apply({"params": p}, x, t, {"label": label}).prediction))

            with jax.default_matmul_precision("highest"):
                gradients[plain] = jax.jit(jax.grad(loss))(params)
        flat = {plain: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for plain, g in gradients.items()}
        yield {"check": f"gradient of SiT, {variant}", "error": relative(flat[False], flat[True]), "bound": 0.05}


def sources_of(n: int) -> tuple[int, int, int, int]:
    return (n, 2, 16, 128) if SMOKE.value else (n, 32, 256, 1152)


def aggregation() -> Iterator[dict]:
    """Rows of milliseconds, forward and both ways, and the bytes that the forward pass moves by design."""
    import cases
    import jax
    import jax.numpy as jnp

    from dar_jax import routing

    for query, n in itertools.product(("static_t", "dynamic"), (15, 57)):
        _, b, t, d = shape = sources_of(n)
        keys = jax.random.split(jax.random.key(n), 3)
        u = jax.random.normal(keys[0], (b, t if query == "dynamic" else 1, d)) * d**-0.5
        sources = jax.random.normal(keys[1], shape, jnp.bfloat16)
        g = jax.random.normal(keys[2], (b, t, d), jnp.bfloat16)
        inv_rms = jax.jit(routing.inverse_rms)(sources)
        forms = {"plain": cases.plain, "ours": functools.partial(cases.lean, "auto", inv_rms)}
        row = {"query": query, "sources": n, "bytes_forward": 2 * (n + 1) * b * t * d}
        for name, form in forms.items():
            forward = functools.partial(jax.jit(form), u, sources)
            both = functools.partial(jax.jit(functools.partial(cases.both_ways, form)), u, sources, g)
            row |= {f"{name}_forward_ms": 1e3 * seconds(forward), f"{name}_both_ms": 1e3 * seconds(both)}
        yield row


def attention_times() -> Iterator[dict]:
    """Rows of milliseconds, forward and both ways."""
    import jax
    import jax.numpy as jnp

    from dar_jax.models import attention

    shapes = [(32, 256, 16, 72), (32, 256, 12, 64), (1, 4096, 24, 128)]
    for b, tokens, heads, d in [(1, 32, 2, 24)] if SMOKE.value else shapes:
        qkv = jax.random.normal(jax.random.key(0), (b, tokens, 3, heads * d), jnp.bfloat16)
        g = jax.random.normal(jax.random.key(1), (b, tokens, heads * d), jnp.bfloat16)
        row = {"samples": b, "tokens": tokens, "heads": heads, "features": d}
        row["flops_forward"] = 4 * b * heads * d * tokens**2
        for name, attend in (("plain", attention.by_autodiff), ("ours", attention.attention)):
            form = functools.partial(attention.self_attention, heads=heads, attend=attend)
            both = jax.jit(lambda x, g, form=form: jax.vjp(form, x)[1](g))
            row[f"{name}_forward_ms"] = 1e3 * seconds(functools.partial(jax.jit(form), qkv))
            row[f"{name}_both_ms"] = 1e3 * seconds(functools.partial(both, qkv, g))
        yield row


def steps() -> Iterator[dict]:
    """Rows by size and case, with milliseconds, bytes of temporaries and the planner's estimate of the same program."""
    import jax
    from cases import make_case

    from dar_jax.models.flops import peak_flops
    from dar_jax.planning import CHIPS, count_kernel_seconds, read_schedule
    from dar_jax.planning.gpus import GPUS

    kind = jax.devices()[0].device_kind
    gpu = next((gpu for gpu in GPUS.values() if gpu.name == kind), None)
    tpu = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v4": "v4", "TPU v6 lite": "v6e"}.get(kind)
    chip = gpu or (tpu and CHIPS[tpu])
    for size in SIZES.value:
        names = [*CASES.value, CASES.value[0]]  # the first again: how much the device drifts
        for name in names[:2] if SMOKE.value else names:
            case = make_case(name, size, 2 if SMOKE.value else BATCHES[size], "bfloat16", "dense")

            def train(case=case):
                case["state"], metrics = case["step"](case["state"], (), case["batch"])
                return metrics["loss"]

            def evaluate(case=case):
                return case["evaluate"](case["state"].params, *case["batch"].values())

            row = {"size": size, "case": name, "batch": len(case["batch"]["x1"])}
            row |= {"step_ms": 1e3 * seconds(train, 5), "evaluation_ms": 1e3 * seconds(evaluate, 5)}
            row |= {"images_per_second": 1e3 * row["batch"] / row["step_ms"], "temp_bytes": case["temp_bytes"]}
            row["compile_seconds"] = case["compile_seconds"]
            if peak := peak_flops(kind):
                row["mfu"] = 3 * row["batch"] * case["forward_flops"] / (row["step_ms"] / 1e3) / peak
            if chip:
                schedule = read_schedule(case["step"].as_text(), chip)
                kernels = schedule.kernel_seconds
                if gpu:
                    kernels = count_kernel_seconds(case["jaxpr"], "cuda", peak, gpu.bandwidth)
                row["estimated_ms"] = 1e3 * (schedule.seconds + kernels)
            yield row
            del case, train, evaluate
            gc.collect()
            jax.clear_caches()


def torch_times() -> Iterator[dict]:
    """Rows of PyTorch: SiT by sizes as in `steps`, and the plain aggregation as torch.compile makes it."""
    try:
        import torch
    except ImportError:
        yield {"skipped": "PyTorch is not installed"}
        return
    if not torch.cuda.is_available() and not SMOKE.value:
        yield {"skipped": "PyTorch sees no GPU"}
        return
    import torch_case

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile if device == "cuda" else lambda f: f
    timed = functools.partial(seconds, wait=lambda _: device == "cuda" and torch.cuda.synchronize())
    for n in (15, 57):
        shape, form = sources_of(n), compiled(torch_case.aggregate)
        u = (torch.randn(shape[1], 1, shape[3], device=device) * shape[3] ** -0.5).requires_grad_()
        sources = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

        def both(u=u, sources=sources, form=form):
            u.grad = sources.grad = None
            form(u, sources).sum().backward()

        row = {"aggregation of": n, "both_ms": 1e3 * timed(both)}
        with torch.inference_mode():
            row["forward_ms"] = 1e3 * timed(functools.partial(form, u, sources))
        yield row
        del u, sources
    for size in SIZES.value:
        batch = 2 if SMOKE.value else BATCHES[size]
        try:
            case = torch_case.TorchCase(size, batch, device, torch.bfloat16, compiled)
            row = {"size": size, "batch": batch, "step_ms": 1e3 * timed(case.step, 5)}
            row["evaluation_ms"] = 1e3 * timed(case.evaluate, 5)
            if device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            row = {"size": size, "batch": batch, "skipped": "PyTorch ran out of memory"}
        yield row
        case = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def wrong(rows: list[dict]) -> list[str]:
    """The checks that did not pass; NaN does not."""
    return [row["check"] for row in rows if not row["error"] <= row["bound"]]


def page(results: dict) -> str:
    """What docs/ shows: every part as a table, with where and when it was measured."""
    lines = ["# Measured on a GPU or TPU", "", "Written by `python benchmarks/on_gpu.py`. Times are medians.", ""]
    for part in (part for part in PARTS if part in results):
        rows, measured = results[part]["rows"], (f"{k} {v}" for k, v in results[part].items() if k != "rows")
        lines += [f"## {part.capitalize()}", "", f"Measured: {', '.join(measured)}.", ""]
        if part == "checks":
            lines += [f"{len(rows) - len(wrong(rows))} of {len(rows)} within their bounds.", ""]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_text(row.get(key)) for key in columns) + " |" for row in rows] + [""]
    return "\n".join(lines)


def _text(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def about(part: str) -> dict:
    """The device, the library, the commit and the date."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    known = {"commit": done.stdout.strip() or "unknown", "date": time.strftime("%Y-%m-%d")}
    if part != "torch":
        import jax

        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **known}
    try:  # without jax, which leaves the whole memory to PyTorch
        import torch
    except ImportError:
        return known
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, **known}


def run_part(part: str, path: pathlib.Path) -> None:
    """Runs a part in this process, in the place of what the results have of it."""
    functions = dict(zip(PARTS, (checks, aggregation, attention_times, steps, torch_times), strict=True))
    results = json.loads(path.read_text()) if path.exists() else {}
    start, rows, made = time.monotonic(), [], about(part)
    for row in functions[part]():
        print(row, flush=True)
        rows.append(row)
        results[part] = {**made, "minutes": round((time.monotonic() - start) / 60, 2), "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")


def run_study(name: str, root: pathlib.Path, given: list[str]) -> int:
    """Runs a study with these flags, and returns its exit code. It needs no tensorflow: TensorBoard is off then."""
    clone = pathlib.Path(__file__).parents[1]
    if not (script := clone / "studies" / f"{name}.py").exists():
        sys.exit(f'error: --study names "{name}"; there is no {script}.')
    needed = ("grain", "ml_collections", "matplotlib", "PIL", "safetensors", "scipy")
    if missing := [package for package in needed if not importlib.util.find_spec(package)]:
        sys.exit(f"error: --study needs {', '.join(missing)}; put the wheels on PYTHONPATH, as docs/costs.md says.")
    path = os.pathsep.join([str(clone), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, script, f"--root={root.resolve()}", *given]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=clone).returncode


def main(argv):
    for flag, known in ((RUN, PARTS), (SIZES, BATCHES)):
        if unknown := [name for name in flag.value if name not in known]:
            sys.exit(f'error: --{flag.name} names "{unknown[0]}"; there are {", ".join(known)}.')
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    if STUDY.value:
        sys.exit(run_study(STUDY.value, out / STUDY.value, argv[1:]))
    if PART.value:
        run_part(PART.value, path)
        return
    flags_ = f"{os.environ.get('XLA_FLAGS', '')} {NOTES}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags_, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if SMOKE.value:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    failed = []
    for part in RUN.value:
        print(f"== {part}", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}"]
        if subprocess.run(command, env=environment).returncode:
            failed.append(part)
    results = json.loads(path.read_text()) if path.exists() else {}
    (out / "page.md").write_text(page(results))
    print(page(results))
    if "checks" in RUN.value and (bad := wrong(results.get("checks", {"rows": []})["rows"])):
        sys.exit(f"error: wrong: {'; '.join(bad)}.")
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not end; see above.")


if __name__ == "__main__":
    app.run(main)
