"""The smallest run that has every part: a routed SiT of 4 tokens and 16 features, and random batches for it."""

import contextlib
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dar_jax import config as config_lib
from dar_jax import objectives, sharding
from dar_jax.sharding import make_mesh as mesh_of  # tests put their own in place of it
from dar_jax.training.setup import build_algorithm, set_up


def make_config():
    config = config_lib.default()
    config.model.update(patch_size=4, depth=2, hidden_size=16, num_heads=2)
    config.optimizer.update(learning_rate=1e-3, ema_decay=0.9)
    config.train.update(num_steps=12, batch_size=16, log_every_steps=1)
    config.checkpoint.every_steps = 4
    config.sampler.update(method="euler", num_steps=2)
    config.eval.batch_size = 8
    return config


def make_mesh(data: int, fsdp: int, tensor: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor of the eight host devices."""
    mesh = config_lib.default().mesh
    mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    return mesh_of(mesh, jax.devices()[: data * fsdp * tensor])


@contextlib.contextmanager
def all_runs_on(mesh_shape: tuple[int, int], cache: pathlib.Path):
    """All runs of this process are on such a mesh, and compile the same program once."""
    caching = {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in caching}
    with pytest.MonkeyPatch.context() as patch:
        mesh = make_mesh(*mesh_shape)
        patch.setattr(sharding, "make_mesh", lambda _: mesh)
        for name, value in caching.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def initial(config):
    """Initial parameters of the model of `config`, in linen's boxes."""
    return objectives.build(config).init(jax.random.key(config.seed))


def abstract(config, mesh: Mesh):
    """Shapes and shardings of these parameters: the target of a restore."""
    return sharding.abstract(mesh, lambda: initial(config))


def batches(config, count: int):
    rng = np.random.default_rng(0)
    size, shape = config.train.batch_size, (config.data.image_size,) * 2 + (config.model.channels,)
    for _ in range(count):
        x1 = rng.uniform(-1, 1, (size, *shape)).astype(np.float32)
        label = rng.integers(0, config.model.num_classes, size, dtype=np.int32)
        yield {"x1": x1, "condition": {"label": label}}


def run(config, mesh: Mesh, steps: int):
    """Returns the states before the first and after every step, and the metrics, of `steps` train steps."""
    with sharding.use(mesh):
        setup = set_up(config, build_algorithm(config), mesh)
        step = jax.jit(setup.algorithm.step)  # donates nothing, because all states are kept
        states, metrics = [setup.init()], []
        for batch in batches(config, steps):
            batch = jax.device_put(batch, sharding.batch_sharding(mesh))
            state, values = step(states[-1], (), batch)
            states.append(state)
            metrics.append(jax.device_get(values))
    return states, metrics
