"""What several benchmarks time: a model with its compiled step, and one aggregation in two forms."""

import time

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax import config as config_lib
from dar_jax import models, sharding
from dar_jax.models.flops import forward_flops
from dar_jax.routing import Execution, read
from dar_jax.training.setup import build_algorithm, set_up


def make_case(case: str, size: str, batch_size: int, dtype: str, remat: str) -> dict:
    """A variant, or variant:chunk_size, of SiT on latents of 32x32x4: its state, a batch and its compiled step."""
    variant, _, chunk_size = case.partition(":")
    config = config_lib.route(config_lib.default(), variant)
    config.model.update(space="latents", input_size=32, channels=4, num_classes=1000, dtype=dtype, remat=remat)
    config.model.update(config_lib.SIZES[size])
    config.model.routing.chunk_size = int(chunk_size or 4)
    model, run = models.build(config.model), set_up(config, build_algorithm(config), sharding.make_mesh(config.mesh))
    state = run.init()
    x = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 4))
    batch = {"x1": x, "condition": {"label": jnp.zeros(len(x), jnp.int32)}}
    start = time.monotonic()
    traced = run.step.trace(state, (), batch)
    step = traced.lower().compile()
    seconds = time.monotonic() - start
    evaluate = jax.jit(lambda p, x, y: model.apply({"params": p}, x, jnp.full(len(x), 0.5), y).prediction)
    return {
        "step": step,
        "evaluate": evaluate,
        "state": state,
        "batch": batch,
        "compile_seconds": seconds,
        "jaxpr": traced.jaxpr.jaxpr,
        "forward_flops": forward_flops(model),
        "temp_bytes": step.memory_analysis().temp_size_in_bytes,
        "step_seconds": [],
        "evaluation_seconds": [],
    }


def plain(u: Array, sources: Array) -> Array:
    """One aggregation as one writes it first: u `[B, 1 or T, D]`, sources `[N, B, T, D]` -> `[B, T, D]`."""
    wide = sources.astype(jnp.float32)
    keys = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    scores = jnp.einsum("btd,kbtd->kbt", jnp.broadcast_to(u, sources.shape[1:]), keys)
    return jnp.einsum("kbt,kbtd->btd", jax.nn.softmax(scores, axis=0), wide).astype(sources.dtype)


def lean(implementation: str, inv_rms: Array, u: Array, sources: Array) -> Array:
    """The same by `routing.read`, which is given 1 / rms of the sources, as a stack stores it."""
    (aggregate,), _ = read(Execution(implementation), (u,), sources, inv_rms, jnp.int32(len(sources)))
    return aggregate


def both_ways(form, u: Array, sources: Array, g: Array):
    """The aggregate, and the cotangents of u and sources."""
    aggregate, vjp = jax.vjp(form, u, sources)
    return aggregate, vjp(g)
