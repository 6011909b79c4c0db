"""Checks every kernel on the GPU or TPU of this machine, and times what the docs only estimate. One command.

    python benchmarks/on_gpu.py --out=on_gpu

Needs jax, flax, optax, orbax-checkpoint, ml_collections and numpy: no data, no tensorflow. Where PyTorch with CUDA is
installed it is timed beside. Writes results.json and page.md to --out, after every part, so that a part can be run
alone, and again: --parts=checks,steps. Each part is a process of its own, which gives all memory back. All parts with
the sizes below are meant to take less than 20 minutes on one H100. What each does:

  checks       kernels against plain autodiff in float32 on the same device; ends with exit code 1 if one is wrong
  aggregation  one aggregation of 15 and of 57 sources, forward and backward, against the plain form
  attention    over 256 tokens with heads of 72 features, and over 4,096 with heads of 128, against the plain form
  steps        train step and one evaluation for sampling, in bfloat16, with MFU, memory and the planner's estimate
  torch        the same of PyTorch: SiT with torch.compile, autocast and its fused attention, and the aggregation

--smoke takes tiny shapes, so that the script itself can be tried on a CPU, where kernels are interpreted.
"""

import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where dar_jax is not installed; tests.parity of PyTorch

PARTS = ("checks", "aggregation", "attention", "steps", "torch")
OUT = flags.DEFINE_string("out", "on_gpu", "Folder of results.json and page.md, in which parts are added up")
RUN = flags.DEFINE_list("parts", [*PARTS], "What to run")
SIZES = flags.DEFINE_list("sizes", ["S", "B", "L", "XL"], "Published sizes of SiT, patch 2, latents of 32x32x4")
CASES = flags.DEFINE_list("cases", ["residual", "static_t:4", "dynamic:4", "static_t:1"], "As in step_time.py")
BATCHES = flags.DEFINE_list("batches", ["256", "128", "64", "64"], "Images per step, for each size")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds, after one to warm up")
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny shapes, to try the script on a CPU")
PART = flags.DEFINE_enum("part", None, PARTS, "The part that this process runs; set by the script itself")

# What gives the planner's estimate for a GPU: the compiler notes its own figure for every fusion.
NOTES = "--xla_gpu_collect_cost_model_stats=true"


def seconds(call, calls: int = 10) -> float:
    """Median over rounds of what a call takes on the device, when so many are given to it at once."""
    import jax

    jax.block_until_ready(call())
    rounds = []
    for _ in range(ROUNDS.value):
        start = time.perf_counter()
        results = [call() for _ in range(1 if SMOKE.value else calls)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / len(results))
        del results
    return float(np.median(rounds))


def relative(found, expected) -> float:
    """The distance over the norm of what is expected, in float64; NaN is passed on."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def checks() -> list[dict]:
    """Rows of {"check", "error", "bound"}: the largest relative error of outputs and cotangents of every kernel."""
    import jax
    import jax.numpy as jnp

    from dar_jax import routing
    from dar_jax.models import attention

    rows, rng = [], np.random.default_rng(time.time_ns())  # fresh inputs every time
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
        rows.append({"check": name, "error": max(errors, key=lambda e: (np.isnan(e), e)), "bound": bound})
        print(f"{name}: {rows[-1]['error']:.1e} of {bound:g}", flush=True)

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
            compare(name, *parts, (u, sources), dtype, bound)
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
            compare(name, sublayer, plain_sublayer, inputs, dtype, bound)

    for tokens, d in [(32, 24)] if SMOKE.value else [(256, 64), (256, 72), (250, 72), (1024, 72), (1100, 128)]:
        x = normal(2, tokens, 3, 2 * d, dtype=jnp.bfloat16)
        by_kernels = lambda qkv: attention.self_attention(qkv, 2)  # noqa: E731
        plain = lambda qkv: attention.self_attention(qkv, 2, None, attention.by_autodiff)  # noqa: E731
        compare(f"attention, {tokens} tokens, heads of {d}", by_kernels, plain, (x,), jnp.bfloat16, 2e-2)
        is_read = jnp.asarray(rng.random((2, tokens)) < 0.7)
        by_kernels = lambda qkv, is_read=is_read: attention.self_attention(qkv, 2, is_read)  # noqa: E731
        plain = lambda qkv, is_read=is_read: attention.self_attention(qkv, 2, is_read, attention.by_autodiff)  # noqa: E731
        compare(f"attention with a mask, {tokens} tokens, heads of {d}", by_kernels, plain, (x,), jnp.bfloat16, 2e-2)
    rows += whole_models()
    return rows


def whole_models() -> list[dict]:
    """The gradient of a loss of a small SiT by kernels, beside that of its plain form in float32."""
    import jax
    import jax.numpy as jnp

    from dar_jax import config as config_lib
    from dar_jax import models

    rows, size = [], 128 if SMOKE.value else 384
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
        rows.append({"check": f"gradient of SiT, {variant}", "error": relative(flat[False], flat[True]), "bound": 0.05})
        print(f"{rows[-1]['check']}: {rows[-1]['error']:.1e}", flush=True)
    return rows


def sources_of(n: int) -> tuple[int, int, int, int]:
    return (n, 2, 16, 128) if SMOKE.value else (n, 32, 256, 1152)


def aggregation() -> list[dict]:
    """Rows of milliseconds, forward and both ways, and the bytes that a pass must move over the time it takes."""
    import cases
    import jax
    import jax.numpy as jnp

    from dar_jax import routing

    rows = []
    for query in ("static_t", "dynamic"):
        for n in (15, 57):
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
            rows.append(row)
            print(row, flush=True)
    return rows


def attention_times() -> list[dict]:
    """Rows of milliseconds, forward and both ways."""
    import jax
    import jax.numpy as jnp

    from dar_jax.models import attention

    rows = []
    for b, tokens, heads, d in (
        [(1, 32, 2, 24)] if SMOKE.value else [(32, 256, 16, 72), (32, 256, 12, 64), (1, 4096, 24, 128)]
    ):
        qkv = jax.random.normal(jax.random.key(0), (b, tokens, 3, heads * d), jnp.bfloat16)
        g = jax.random.normal(jax.random.key(1), (b, tokens, heads * d), jnp.bfloat16)
        row = {
            "samples": b,
            "tokens": tokens,
            "heads": heads,
            "features": d,
            "flops_forward": 4 * b * heads * d * tokens**2,
        }
        for name, attend in (("plain", attention.by_autodiff), ("ours", attention.attention)):
            form = functools.partial(
                lambda attend, heads, x: attention.self_attention(x, heads, None, attend), attend, heads
            )
            both = jax.jit(lambda x, g, form=form: jax.vjp(form, x)[1](g))
            row[f"{name}_forward_ms"] = 1e3 * seconds(functools.partial(jax.jit(form), qkv))
            row[f"{name}_both_ms"] = 1e3 * seconds(functools.partial(both, qkv, g))
        rows.append(row)
        print(row, flush=True)
    return rows


def steps() -> list[dict]:
    """Rows by size and case, with milliseconds, bytes of temporaries and the planner's estimate of the same program."""
    import jax
    from cases import make_case

    from dar_jax.models.flops import peak_flops
    from dar_jax.planning import CHIPS, count_kernel_seconds, read_schedule
    from dar_jax.planning.gpus import GPUS

    kind = jax.devices()[0].device_kind
    gpu = next((g for g in GPUS.values() if kind.startswith(g.name.removesuffix(" 80GB HBM3"))), None)
    tpu = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v4": "v4", "TPU v6 lite": "v6e"}.get(kind)
    chip, rows = gpu or (tpu and CHIPS[tpu]), []
    for size, batch in zip(SIZES.value, BATCHES.value, strict=False):
        names = [*CASES.value, CASES.value[0]]  # the first again: how much the device drifts
        for name in names[:2] if SMOKE.value else names:
            case = make_case(name, size, 2 if SMOKE.value else int(batch), "bfloat16", "dense")

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
            rows.append(row)
            print(row, flush=True)
            del case, train, evaluate
            gc.collect()
            jax.clear_caches()
    return rows


def torch_times() -> list[dict]:
    """Rows of PyTorch: SiT by sizes as in `steps`, and the plain aggregation as torch.compile makes it."""
    try:
        import torch
    except ImportError:
        return [{"skipped": "PyTorch is not installed"}]
    if not torch.cuda.is_available() and not SMOKE.value:
        return [{"skipped": "PyTorch sees no GPU"}]
    import torch_case

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    compiled = torch.compile if device == "cuda" else lambda f: f

    def seconds_of(call, calls=10):
        for _ in range(3):
            call()
        rounds = []
        for _ in range(ROUNDS.value):
            sync()
            start = time.perf_counter()
            for _ in range(1 if SMOKE.value else calls):
                call()
            sync()
            rounds.append((time.perf_counter() - start) / (1 if SMOKE.value else calls))
        return float(np.median(rounds))

    rows = []
    for n in (15, 57):
        shape, form = sources_of(n), compiled(torch_case.aggregate)
        u = (torch.randn(shape[1], 1, shape[3], device=device) * shape[3] ** -0.5).requires_grad_()
        sources = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

        def both(u=u, sources=sources, form=form):
            u.grad = sources.grad = None
            form(u, sources).sum().backward()

        row = {"aggregation of": n, "both_ms": 1e3 * seconds_of(both)}
        with torch.inference_mode():
            row["forward_ms"] = 1e3 * seconds_of(functools.partial(form, u, sources))
        rows.append(row)
        print(row, flush=True)
        del u, sources
    for size, batch in zip(SIZES.value, BATCHES.value, strict=False):
        try:
            case = torch_case.TorchCase(size, 2 if SMOKE.value else int(batch), device, torch.bfloat16, compiled)
            row = {"size": size, "batch": len(case.x), "step_ms": 1e3 * seconds_of(case.step, 5)}
            row["evaluation_ms"] = 1e3 * seconds_of(case.evaluate, 5)
            if device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            row = {"size": size, "batch": int(batch), "skipped": "PyTorch ran out of memory"}
        rows.append(row)
        print(row, flush=True)
        case = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def wrong(rows: list[dict]) -> list[str]:
    """The checks that did not pass; NaN does not."""
    return [row["check"] for row in rows if not row["error"] <= row["bound"]]


def page(results: dict) -> str:
    """What docs/ shows: every part as a table."""
    about = results["about"]
    lines = [f"# Measured on {about['device']}", "", f"{about['date']}, commit {about['commit']}, jax {about['jax']}."]
    lines += ["Written by `python benchmarks/on_gpu.py`. Times are medians.", ""]
    for part in PARTS:
        rows = results.get(part)
        if not rows:
            continue
        lines += [f"## {part.capitalize()}", ""]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if part == "checks":
            lines += [f"{len(rows) - len(wrong(rows))} of {len(rows)} within their bounds.", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_text(row.get(key)) for key in columns) + " |" for row in rows] + [""]
    return "\n".join(lines)


def _text(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def about() -> dict:
    import jax

    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    known = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    return known | {"commit": done.stdout.strip() or "unknown", "date": time.strftime("%Y-%m-%d")}


def run_part(part: str, path: pathlib.Path) -> None:
    """Runs a part in this process and adds its rows to the results."""
    functions = {"checks": checks, "aggregation": aggregation, "attention": attention_times, "steps": steps}
    start, rows = time.monotonic(), (torch_times if part == "torch" else functions[part])()
    results = json.loads(path.read_text()) if path.exists() else {}
    if part != "torch":  # which leaves the whole memory to PyTorch
        results["about"] = about()
    results[part] = rows
    results.setdefault("minutes", {})[part] = round((time.monotonic() - start) / 60, 2)
    path.write_text(json.dumps(results, indent=1) + "\n")


def main(_):
    if unknown := [part for part in RUN.value if part not in PARTS]:
        sys.exit(f'error: --parts names "{unknown[0]}"; there are {", ".join(PARTS)}.')
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
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
    if "about" in results:
        (out / "page.md").write_text(page(results))
        print(page(results))
    if bad := wrong(results.get("checks", [])):
        sys.exit(f"error: wrong: {'; '.join(bad)}.")
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not end; see above.")


if __name__ == "__main__":
    app.run(main)
