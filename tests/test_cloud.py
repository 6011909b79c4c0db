"""Runs, data, weights and outputs in a bucket, on a server of the tests that can fail on demand."""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from dar_jax import checkpoint, files
from dar_jax import config as config_lib
from dar_jax.data.prepare import describe, prepare
from dar_jax.data.sources import ArraySource, open_source
from dar_jax.errors import UserError
from dar_jax.evaluation import sets
from dar_jax.logs import Logs
from dar_jax.pretrained import vae
from dar_jax.pretrained.state_dict import fingerprint, read_state_dict
from dar_jax.training.loop import train
from tests import gcs
from tests.integration.doors import Doors, kill
from tests.training import tiny
from tests.training.test_checkpoint import make_state, restore, save

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs the extra gcs")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with gcs.serving() as server, tiny.all_runs_on((8, 1), tmp_path_factory.mktemp("cache")):
        yield server


@pytest.fixture
def place(server, request, tmp_path, monkeypatch):
    """A new place in the bucket, and an empty cache of copies."""
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    yield f"gs://bucket/{request.node.name}"
    server.faults = lambda method, path: None


def names(server, place: str) -> set[str]:
    """What is in a place of the bucket."""
    prefix = place.removeprefix("gs://") + "/"
    return {name.removeprefix(prefix) for name in server.objects if name.startswith(prefix)}


def faulty(*faults):
    """One fault for each of the first requests, then none."""
    remaining = list(faults)
    return lambda method, path: remaining.pop() if remaining else None


def here_and_there():
    """A fault for every 40th request. The response to the write of a manifest is never lost, which has its own test."""
    turn, faults = itertools.count(1), itertools.cycle([429, "lose", 503, "drop", 0.2])

    def fault(method, path):
        found = next(faults) if next(turn) % 40 == 0 else None
        return 503 if found == "lose" and "manifest.ocdbt" in path else found

    return fault


def run(workdir: str, steps: int) -> None:
    config = tiny.make_config()
    config.train.update(num_steps=steps)
    config.checkpoint.update(every_steps=2, keep=1)
    train(config, workdir)


def weights(workdir: str):
    config = tiny.make_config()
    ema, _ = checkpoint.restore_ema(workdir, tiny.abstract(config, tiny.make_mesh(8, 1)))
    return ema


def metrics(workdir: str) -> list[tuple]:
    lines = map(json.loads, (files.path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("fault", [429, 503, 0.2, "drop", "lose"])
def test_files_survive_a_bucket_that_fails_for_a_moment(server, place, tmp_path, fault):
    content = bytes(range(256)) * 1000
    for action in (
        lambda: files.write_text(f"{place}/text", "hello"),
        lambda: (files.path(place) / "text").read_text() == "hello" or pytest.fail("read something else"),
        lambda: files.local(f"{place}/text").read_text() == "hello" or pytest.fail("copied something else"),
    ):
        server.faults = faulty(fault)
        action()
    server.faults = lambda method, path: None
    with files.replacing(f"{place}/bytes") as temporary:
        temporary.write_bytes(content)
    assert files.sha256(f"{place}/bytes") == files.sha256(_write(tmp_path / "bytes", content))
    assert files.sizes(place) == {"text": 5, "bytes": len(content)}


def _write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


def test_a_file_that_is_not_finished_does_not_appear(server, place):
    files.write_text(f"{place}/a", "old")
    with pytest.raises(RuntimeError), files.replacing(f"{place}/a") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert (files.path(place) / "a").read_text() == "old"
    assert names(server, place) == {"a"}


@pytest.mark.parametrize("fault", [None, 503, "lose"])
def test_of_two_that_create_a_file_one_does(server, place, tmp_path, fault):
    server.faults = faulty(fault)
    for lock in (f"{place}/lock", tmp_path / "lock"):
        assert files.create(lock, "mine")
        assert not files.create(lock, "yours")
        assert files.path(lock).read_text() == "mine"


def test_a_copy_never_grows_old_and_is_made_once(server, place):
    files.write_text(f"{place}/weights.npz", "old")
    old = files.local(f"{place}/weights.npz")
    before = len(server.requests)
    assert files.local(f"{place}/weights.npz") == old
    assert not any("alt=media" in path for _, path in server.requests[before:])
    files.write_text(f"{place}/weights.npz", "new")
    assert files.local(f"{place}/weights.npz").read_text() == "new"
    assert not files.local(f"{place}/missing.npz").exists()


@pytest.mark.parametrize(
    "location", ["s3://bucket/a", "gs:/bucket/a", "gs://", "gs:///a", "http://host/a", "file:///a"]
)
def test_a_place_that_is_neither_local_nor_in_a_bucket_is_an_error(location):
    with pytest.raises(UserError, match=re.escape(location)):
        files.path(location)


@pytest.mark.parametrize(
    ("place", "faults", "reason"),
    [
        ("gs://nobody/run", lambda method, path: None, "there is no bucket nobody"),
        ("gs://bucket/run", lambda method, path: 401, "fault 401"),
        ("gs://bucket/run", lambda method, path: 403, "Forbidden"),
        ("gs://bucket/run", lambda method, path: 403 if method == "POST" else None, "Forbidden"),
    ],
    ids=["no bucket", "no credentials", "no permission", "read only"],
)  # fmt: skip
def test_a_bucket_that_refuses_is_one_line(server, place, faults, reason):
    server.faults = faults
    try:
        with pytest.raises(Exception) as caught:
            run(place, 2)
    finally:
        server.faults = lambda method, path: None
    text = str(caught.value) if isinstance(caught.value, UserError) else files.failure(caught.value)
    assert reason in text


def test_checkpoints_and_logs_in_a_bucket_that_fails_here_and_there(server, place):
    server.faults = here_and_there()
    save(place, 2, 4, 6, keep=1)
    logs = Logs(place, 0, 9, 1, 1.0)
    logs.write(1, {"loss": 1.0})
    logs.flush()
    logs.write(2, {"loss": 2.0})  # lost by a kill
    logs = Logs(place, 1, 9, 1, 1.0)
    logs.write(2, {"loss": 3.0})
    logs.close()
    server.faults = lambda method, path: None
    jax.tree.map(np.testing.assert_array_equal, restore(place), make_state(6))
    assert checkpoint.saved_steps(place) == [6]
    assert metrics(place) == [(1, 1.0), (2, 3.0)]
    assert sum("tfevents" in name for name in names(server, place)) == 2


def test_a_lost_response_to_the_write_of_a_manifest_is_one_line_and_the_next_save_goes_on(server, place):
    """Orbax writes the weights of a process in one transaction. Tensorstore cannot tell that it was itself that has
    written the manifest (google/tensorstore#290), so the save fails."""
    save(place, 2)
    written = "checkpoints%2F4%2Fema%2Focdbt.process_0%2Fmanifest.ocdbt"
    lost = iter(["lose"])
    server.faults = lambda method, path: next(lost, None) if method == "POST" and written in path else None
    with pytest.raises(Exception, match="ALREADY_EXISTS") as caught:
        save(place, 4)
    assert "ALREADY_EXISTS" in files.failure(caught.value)
    assert checkpoint.saved_steps(place) == [2]
    save(place, 4)
    jax.tree.map(np.testing.assert_array_equal, restore(place), make_state(4))


def test_what_is_left_of_a_killed_save_is_no_checkpoint_and_a_copy_from_a_disk_is_one(server, place, tmp_path):
    save(tmp_path, 2)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            server.objects[f"{place.removeprefix('gs://')}/{file.relative_to(tmp_path)}"] = file.read_bytes(), 1
    killed, torn = f"{place}/checkpoints/4", f"{place}/checkpoints/6"
    for name in names(server, f"{place}/checkpoints/2"):
        content = (files.path(place) / "checkpoints/2" / name).read_text() if "METADATA" in name else ""
        if name != "commit_success.txt":  # which is written last
            files.write_text(f"{killed}/{name}", content)
        if not name.startswith("ema/"):
            files.write_text(f"{torn}/{name}", content)
    assert checkpoint.saved_steps(place) == [2, 6] and checkpoint.set_damaged_aside(place) == 2
    jax.tree.map(np.testing.assert_array_equal, restore(place), make_state(2))
    steps = {name.split("/")[1].split("-")[0] for name in names(server, place) if "/" in name}
    assert steps == {"2", "damaged"}


@pytest.fixture
def prepared(server, place, monkeypatch):
    source = ArraySource(np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3), np.arange(5), 5)
    settings = describe(source, "folder:x", "train", 8, None, "float16", True, shard_size=2)
    prepare(source, settings, None, f"{place}/train", max_skipped=0, worker=0, workers=1, say=lambda line: None)
    data = config_lib.default().data
    data.update(source="latents", path=place, train_split="train")
    return data


def test_prepared_data_in_a_bucket(server, place, prepared, capfd):
    source = open_source(prepared, "train")
    assert [source[i]["label"] for i in range(5)] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(source[1]["image"].ravel(), np.arange(192, 384).astype(np.uint8))
    assert "copied 3 of 3 files" in capfd.readouterr().out
    before = len(server.requests)
    open_source(prepared, "train")
    assert not any("alt=media" in path and "array_record" in path for _, path in server.requests[before:])


def test_a_damaged_shard_in_a_bucket_is_named(server, place, prepared):
    (name,) = (name for name in names(server, place) if "shard-00001" in name and name.endswith("record"))
    key = f"{place.removeprefix('gs://')}/{name}"
    content, generation = server.objects[key]
    server.objects[key] = content[:-1] + bytes([content[-1] ^ 1]), generation
    with pytest.raises(UserError, match=r"shard-00001-of-00003.array_record.*checksum"):
        open_source(prepared, "train")
    server.objects[key] = content[:-1], generation
    with pytest.raises(UserError, match=r"shard-00001-of-00003.array_record"):
        open_source(prepared, "train")


def test_weights_and_references_in_a_bucket(server, place):
    model = vae.AutoencoderKL((32,), 4)
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"],
    )
    vae.write(f"{place}/vae", vae.Vae(model, params, 0.0, vae.SCALE, fingerprint(params)))
    jax.tree.map(np.testing.assert_array_equal, vae.load(f"{place}/vae", "--vae").params, params)
    with pytest.raises(UserError, match="holds a VAE"):
        vae.write(f"{place}/vae", vae.Vae(model, params, 0.0, 2.0, ""))
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    sets.write_set(f"{place}/ref.npz", images.shape, [images[:2], images[2:]], {"mu": np.zeros(3)}, "--out")
    found = sets.open_images(f"{place}/ref.npz", "--reference")
    np.testing.assert_array_equal(np.concatenate(list(found.batches(2))), images)
    assert set(read_state_dict(f"{place}/ref.npz")) == {"arr_0", "mu"}
    with pytest.raises(UserError, match=r"none.npz.* is no file"):
        sets.open_images(f"{place}/none.npz", "--reference")


def test_images_in_a_bucket_are_an_error(place):
    data = config_lib.default().data
    for source in ("folder", "idx", "tfds"):
        data.update(source=source, path=place, name="mnist")
        with pytest.raises(UserError, match="only prepared data"):
            open_source(data, "train")


def test_all_places_go_through_files():
    """Others take places apart only for the cache of programs, the package itself, /proc, and what must be local:
    images that are no prepared data, the font of emoji, and published weights larger than memory."""
    root = pathlib.Path(files.__file__).parent
    found = {path.name for path in root.rglob("*.py") if re.search(r"pathlib|os\.path\.|shutil", path.read_text())}
    local = {"sources.py", "caption_folder.py", "emoji.py", "shards.py"}
    assert found == {"files.py", "runtime.py", "plan.py", "cli.py", "lock.py"} | local


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(server, place, tmp_path):
    """Also when the bucket fails here and there, and when it is resumed."""
    run(str(tmp_path / "local"), 6)
    server.faults = here_and_there()
    run(f"{place}/run", 3)
    run(f"{place}/run", 6)
    server.faults = lambda method, path: None
    assert checkpoint.saved_steps(f"{place}/run") == [6]
    assert metrics(f"{place}/run") == metrics(str(tmp_path / "local"))
    jax.tree.map(np.testing.assert_array_equal, weights(f"{place}/run"), weights(str(tmp_path / "local")))
    assert any("tfevents" in name for name in names(server, f"{place}/run"))


@pytest.mark.slow
def test_all_doors_take_a_bucket(server, place, tmp_path):
    def door(name: str, *flags: str) -> None:
        command = [sys.executable, "-m", f"dar_jax.{name}", *flags]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-2000:]

    small = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "eval.num_samples=16", "eval.grid_size=2"]
    small += ["train.num_steps=12", "eval.every_steps=12", "eval.final_samples=0", "sampler.num_steps=2"]
    run = f"--workdir={place}/run"
    door("main", "--config=configs/digits.py", run, "--profile=1", *(f"--config.{field}" for field in small))
    door("sample", run, "--steps=2", f"--out={place}/samples.png")
    door("evaluate", run, "--num_samples=16", f"--json={place}/x.json", f"--samples_out={place}/samples.npz")
    door("diagnose", run, "--num_images=16", "--timesteps=0,1", f"--out={place}/diagnosis")
    written = names(server, place)
    assert {"run/samples/00000012.png", "run/best.json", "run/convnet.npz", "run/config.json", "samples.png"} <= written
    assert {
        "x.json",
        "samples.npz",
        "diagnosis/report.html",
        "diagnosis/diagnosis.json",
        "diagnosis/curves.pdf",
    } <= written
    assert any("run/profile/" in name for name in written)
    assert not any("tmp" in name for name in written)


@pytest.mark.slow
def test_two_processes_killed_in_a_bucket_go_on_and_equal_one_on_a_disk(server, place, tmp_path):
    doors = [Doors(tmp_path, tmp_path / "cache") for _ in range(2)]
    doors[0].run("--config.mesh.fsdp=2")
    doors[1].workdir = files.path(place)
    started = doors[1].start("--config.mesh.fsdp=2", processes=2, devices=2, send=(1, "SIGKILL,7,4"))
    output = started[1].communicate(timeout=500)[0]
    assert started[1].returncode == -9, output
    kill(started[:1])
    text = doors[1].run("--config.mesh.fsdp=2", "--distributed=on", processes=2, devices=2)
    assert "resumed at step 4" in text
    ours, theirs = (list(door.metrics().values()) for door in doors)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
