"""Runs, data, weights and outputs in a bucket, on a server of the tests that can fail on demand."""

import importlib.util
import itertools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from dar_jax import checkpoint, files
from dar_jax.errors import UserError
from dar_jax.training.loop import train
from tests import gcs
from tests.training import tiny

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


def test_a_copy_never_grows_old_and_is_made_once(server, place):
    files.write_text(f"{place}/weights.npz", "old")
    old = files.local(f"{place}/weights.npz")
    before = len(server.requests)
    assert files.local(f"{place}/weights.npz") == old
    assert not any("alt=media" in path for _, path in server.requests[before:])
    files.write_text(f"{place}/weights.npz", "new")
    assert files.local(f"{place}/weights.npz").read_text() == "new"
    assert not files.local(f"{place}/missing.npz").exists()


@pytest.mark.parametrize("location", ["s3://bucket/a", "gs:/bucket/a", "gs://", "gs:///a", "http://host/a", "file:///a"])
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


def test_a_run_in_a_bucket_is_the_run_on_a_disk(server, place, tmp_path):
    """Also when the bucket fails here and there, and when it is resumed."""
    run(str(tmp_path / "local"), 6)
    turn = itertools.count(1)
    faults = itertools.cycle([429, 503, "drop", "lose", 0.3])
    server.faults = lambda method, path: next(faults) if next(turn) % 40 == 0 else None
    run(f"{place}/run", 3)
    run(f"{place}/run", 6)
    server.faults = lambda method, path: None
    assert checkpoint.saved_steps(f"{place}/run") == [6]
    assert metrics(f"{place}/run") == metrics(str(tmp_path / "local"))
    jax.tree.map(np.testing.assert_array_equal, weights(f"{place}/run"), weights(str(tmp_path / "local")))
    assert any("tfevents" in name for name in names(server, f"{place}/run"))


def test_a_save_that_was_killed_is_no_checkpoint_and_a_copy_from_a_disk_is_one(server, place, tmp_path):
    run(str(tmp_path), 2)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            server.objects[f"{place.removeprefix('gs://')}/{file.relative_to(tmp_path)}"] = file.read_bytes(), 1
    killed, torn = f"{place}/checkpoints/4", f"{place}/checkpoints/6"
    for name in names(server, f"{place}/checkpoints/2"):
        content = (files.path(place) / "checkpoints/2" / name).read_text() if "META" in name else ""
        if name != "commit_success.txt":  # which is written last
            files.write_text(f"{killed}/{name}", content)
        if not name.startswith("ema/"):
            files.write_text(f"{torn}/{name}", content)
    assert checkpoint.saved_steps(place) == [2]
    run(place, 4)
    assert {name.split("/")[1].split("-")[0] for name in names(server, place) if "/" in name} == {"4", "incomplete"}
    run(str(tmp_path), 4)
    jax.tree.map(np.testing.assert_array_equal, weights(place), weights(str(tmp_path)))
