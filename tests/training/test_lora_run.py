"""A run with adapters from end to end: started, resumed, sampled, merged, planned, and the base that it needs."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import adapters, models, objectives, planning, sharding
from dar_jax.checkpoint import load_config, restore_ema
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import restore, sample_to_file
from dar_jax.init_from import pin_weights, restore_initial
from dar_jax.training import loop
from dar_jax.training.setup import build_algorithm, set_up
from dar_jax.validate import validate
from tests.training import tiny


def base_config():
    config = tiny.make_config()
    config.model.routing.kind = "residual"
    config.train.num_steps = 3
    config.optimizer.update(learning_rate=5e-2, ema_decay=0.5)
    return config


def lora_config(places, **fields):
    config = tiny.make_config()
    config.init_from = str(places / "base")
    config.model.routing.update(chunk_size=2, summary="sum")
    config.lora.update(rank=4, alpha=8.0, dtype="float32")
    groups = ((".*/lora_[ab]", {"learning_rate": 5e-2}), (".*query.*", {"learning_rate": 1e-1}))
    config.optimizer.groups = groups
    config.optimizer.ema_decay, config.train.num_steps = 0.1, 4
    config.update_from_flattened_dict(fields)
    validate(config)
    return config


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_planner_counts_the_base_once():
    """In bfloat16, as frozen: what is trained, averaged and optimized is small."""
    config = lora_config(pathlib.Path("nowhere"), **{"lora.dtype": "bfloat16", "model.routing.kind": "residual"})
    config.optimizer.groups = ()
    found = planning.make_plan(config, "cpu:1").memory_bytes
    whole = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: whole_init(config))))
    assert found["frozen"] == 2 * whole and found["params"] == found["ema"] < 0.3 * whole * 4
    assert found["optimizer"] < 2.1 * found["params"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A residual base of three steps, a routed run with adapters on it of four, and both merged."""
    folder = tmp_path_factory.mktemp("lora")
    with tiny.all_runs_on((2, 2), folder / "cache"):
        loop.train(base_config(), str(folder / "base"))
        loop.train(lora_config(folder), str(folder / "run"))
        adapters.merge(str(folder / "run"), str(folder / "merged"))
        yield folder


def first_state(config, mesh):
    config = pin_weights(config, "nowhere")
    run = set_up(config, build_algorithm(config), mesh)
    state, frozen = run.init(), run.load_frozen()
    ema = restore_initial(config, state.ema, mesh)
    return run, state.replace(params=jax.tree.map(jnp.copy, ema), ema=ema), frozen


def predict(config, params):
    rng = np.random.default_rng(0)
    x_t, label = rng.normal(size=(4, 8, 8, 1)).astype(np.float32), np.array([0, 3, 5, 10])
    apply = jax.jit(
        lambda params: models.build(config.model).apply({"params": params}, x_t, 0.4 * np.ones(4), {"label": label})
    )
    return np.asarray(apply(params).prediction)


def test_the_start_is_the_base_and_steps_leave_it_alone(places):
    """What is trained, averaged and has an optimizer's state are adapters and routing; the base keeps its bits."""
    config, mesh = lora_config(places), sharding.make_mesh(None)
    with sharding.use(mesh):
        run, state, frozen = first_state(config, mesh)
        weights, _ = restore_ema(str(places / "base"), tiny.abstract(base_config(), mesh))
        start = predict(config, run.algorithm.assemble(state.ema, frozen))
        np.testing.assert_allclose(start, predict(base_config(), weights), rtol=1e-4, atol=1e-5)

        before = jax.device_get(frozen)
        for batch in tiny.batches(config, 3):
            state, _ = run.step(state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
        moved = predict(config, run.algorithm.assemble(state.params, frozen))
        assert np.abs(moved - start).max() > 1e-2
        paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim > 0]
        assert paths and all("lora_" in path or "query" in path for path in paths)
        trained = state.params["stack"]["steps"]
        assert np.any(trained["query_1"]["scale"]) and np.any(trained["block_0"]["mlp"]["dense_0"]["lora_b"])
        sizes = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(trained["block_0"])}
        assert sizes[(2, 16, 4)] == (2, 8, 4) and sizes[(2, 4, 64)] == (2, 4, 32)  # split by fsdp = 2


def test_a_run_is_resumed_exactly(places):
    config = lora_config(places)
    config.train.num_steps = 2
    loop.train(config, str(places / "parts"))
    config.train.num_steps = 4
    loop.train(config, str(places / "parts"))
    assert losses(places / "parts") == losses(places / "run") and len(set(losses(places / "run"))) == 4
    mesh = sharding.make_mesh(None)
    abstract = tiny.abstract(config, mesh)
    whole, parts = (restore_ema(str(places / name), abstract)[0] for name in ("run", "parts"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))


def test_samples_equal_those_of_merged_weights(places):
    config = load_config(str(places / "run"))
    merged = load_config(str(places / "merged"))
    assert merged.lora.rank == 0 and merged.init_from == ""
    for name, of in (("run", config), ("merged", merged), ("base", base_config())):
        sample_to_file(of, str(places / name), None, ["0", "2"], 2, str(places / f"{name}.npz"))
    drawn = {name: np.load(places / f"{name}.npz")["arr_0"].astype(int) for name in ("run", "merged", "base")}
    assert np.abs(drawn["run"] - drawn["merged"]).max() <= 1 and np.abs(drawn["run"] - drawn["base"]).max() > 3


def test_adapters_return_from_their_files(places):
    """With the routing; and are refused without it, or by a base of another routing."""
    paths = adapters.export(str(places / "run"), str(places / "files"))
    assert [path.rpartition("/")[2] for path in paths] == ["pytorch_lora_weights.safetensors", "routing.safetensors"]
    config = adapters.load(str(places / "files"), str(places / "base"), str(places / "back"))
    assert (config.lora.rank, config.lora.alpha) == (4, 8.0)
    mesh = sharding.make_mesh(None)
    with sharding.use(mesh):
        wanted, _ = restore(load_config(str(places / "run")), str(places / "run"), mesh, None)
        found, _ = restore(load_config(str(places / "back")), str(places / "back"), mesh, None)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    with pytest.raises(UserError, match="is of a run without adapters"):
        adapters.export(str(places / "base"), str(places / "none"))
    adapters.load(paths[0], str(places / "base"), str(places / "residual"))  # without routing it is another function
    with pytest.raises(UserError, match="the routing of the adapters is not that of the model"):
        adapters.load(paths[0], str(places / "merged"), str(places / "wrong"))


def test_routing_of_a_routed_base_is_trained_on(places):
    config = lora_config(places, **{"init_from": str(places / "merged")})
    mesh = sharding.make_mesh(None)
    with sharding.use(mesh):
        _, state, frozen = first_state(config, mesh)
        whole, _ = restore_ema(str(places / "merged"), sharding.abstract(mesh, lambda: whole_init(config)))
    query = state.params["stack"]["steps"]["query_1"]
    np.testing.assert_array_equal(query["scale"], whole["stack"]["steps"]["query_1"]["scale"])
    assert np.any(query["scale"]) and "query_1" not in frozen["base"]["stack"]["steps"]


def whole_init(config):
    config = config.copy_and_resolve_references()
    config.lora.rank = 0
    return objectives.build(config).init_sampled(jax.random.key(0))


def test_another_base_is_told(places):
    def refused(message, action=loop.train, config=None, workdir="run"):
        with pytest.raises(UserError, match=message) as error:
            action(config or lora_config(places), str(places / workdir))
        assert "\n" not in str(error.value)

    other = base_config()
    other.seed = 1
    loop.train(other, str(places / "other"))
    config = lora_config(places, **{"init_from": str(places / "other"), "train.num_steps": 5})
    refused("does not hold what this run trains on: the weights of step 3 have the SHA-256", config=config)
    refused("config.lora.alpha = 8.0, not 4.0", config=lora_config(places, **{"lora.alpha": 4.0}))
    refused("holds adapters of .*--kind=merged", config=lora_config(places, init_from=str(places / "run")), workdir="x")
    shutil.copytree(places / "base", places / "moved")
    more = base_config()
    more.train.num_steps, more.checkpoint.keep = 5, 1
    loop.train(more, str(places / "moved"))
    config = lora_config(places, **{"init_from": str(places / "moved"), "train.num_steps": 5})
    refused(r"has no checkpoint of step 3 any more.*it has \[5\]", config=config)

    def sample(config, workdir):
        sample_to_file(config, workdir, None, ["0"], 1, str(places / "x.npz"))

    trained = load_config(str(places / "run"))
    trained.init_from = str(places / "moved")
    refused("has no checkpoint of step 3 any more", sample, trained)
    trained.init_from = str(places / "nothing")
    refused("has no config.json and checkpoint", sample, trained)
    no_base = lora_config(places)
    no_base.init_from = ""
    with pytest.raises(UserError, match="needs the weights that are adapted"):
        validate(no_base)
    with pytest.raises(UserError, match="no regular expression"):
        lora_config(places, **{"lora.targets": ("(",)})
    refused("no kernel is called", config=lora_config(places, **{"lora.targets": ("nowhere",)}), workdir="y")
    assert not (places / "y" / "checkpoints").exists() or not any((places / "y" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_text_to_image_model_on_embeddings_is_adapted_and_distilled(tmp_path):
    """As Qwen-Image is, in bfloat16 and on frozen weights: adapters, their files, a student of two adapters."""
    with tiny.all_runs_on((2, 2), tmp_path / "cache"):
        base = text_config()
        base.model.routing.kind = "residual"
        loop.train(base, str(tmp_path / "base"))
        config = text_config()
        config.init_from = str(tmp_path / "base")
        config.lora.update(rank=4, alpha=4.0)
        loop.train(config, str(tmp_path / "adapted"))
        adapters.export(str(tmp_path / "adapted"), str(tmp_path / "files"))
        assert {path.name for path in (tmp_path / "files").iterdir()} >= {
            "pytorch_lora_weights.safetensors", "routing.safetensors"
        }  # fmt: skip
        config.algorithm, config.teacher, config.model.label_dropout = "dmd", config.init_from, 0.0
        config.dmd.update(fake_rank=4, guidance=4.0, guidance_rescale=True, shift=3.0, fake_updates=1)
        loop.train(config, str(tmp_path / "student"))
    assert all(np.isfinite(losses(tmp_path / "adapted"))) and len(losses(tmp_path / "student")) == 2


def text_config():
    config = tiny.make_config()
    config.data.update(source="synthetic", image_size=8)
    config.model.update(family="mmdit", space="latents", channels=16, patch_size=2, dtype="bfloat16", remat="block")
    config.model.update(text="embeddings", text_size=5, text_length=24)
    config.model.routing.update(chunk_size=2, summary="sum", streams="image")
    config.train.update(num_steps=2, batch_size=8)
    config.eval.update(every_steps=0, num_samples=0)
    return config
