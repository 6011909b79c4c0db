"""Order, sharding, flips and resumption of training batches; evaluation arrays."""

import pathlib
import struct
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dar_jax.config import default
from dar_jax.data.pipeline import load_images, train_iterator
from dar_jax.errors import UserError


def numbered(path, count, flip=False):
    """Config of `count` 4x4 images: image i has label i, its left column is 10 + i, the rest 0."""
    images = np.zeros((count, 4, 4), np.uint8)
    images[:, :, 0] = 10 + np.arange(count)[:, None]
    path.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + struct.pack(">III", count, 4, 4)
        (path / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"\x00\x00\x08\x01" + struct.pack(">I", count)
        (path / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))
    data = default().data
    data.source, data.path, data.image_size, data.flip = "idx", str(path), 4, flip
    return data


def iterate(data, batch_size=4, seed=3, index=0, count=1, channels=1, first_step=0):
    rows = np.split(np.arange(batch_size), count)[index]
    space = "latents" if channels > 3 else "pixels"
    return train_iterator(
        data, space=space, channels=channels, batch_size=batch_size, seed=seed, first_step=first_step, rows=rows
    )


def take(iterator, steps):
    return [next(iterator) for _ in range(steps)]


def labels_of(batches):
    return np.concatenate([batch["condition"]["label"] for batch in batches]).tolist()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["condition"]["label"], b["condition"]["label"])
        np.testing.assert_array_equal(a["x1"], b["x1"])


def test_batches_hold_the_images_in_range(tmp_path):
    for batch in take(iterate(numbered(tmp_path, 40)), 5):
        assert batch["x1"].shape == (4, 4, 4, 1) and batch["x1"].dtype == np.float32
        assert batch["condition"]["label"].shape == (4,) and batch["condition"]["label"].dtype == np.int32
        left = (10 + batch["condition"]["label"]) / 127.5 - 1
        np.testing.assert_allclose(batch["x1"][:, :, 0, 0], np.repeat(left[:, None], 4, 1), atol=1e-6)
        assert (batch["x1"][:, :, 1:] == -1).all()


def test_grey_images_feed_an_rgb_model(tmp_path):
    image = next(iterate(numbered(tmp_path, 5), channels=3))["x1"]
    assert image.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("batch_size", [16, 7, 120])
def test_every_epoch_sees_every_example_once_in_a_new_order(tmp_path, batch_size):
    stream = labels_of(take(iterate(numbered(tmp_path, 50), batch_size), -(-150 // batch_size)))
    epochs = [stream[i : i + 50] for i in range(0, 150, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(50)) not in epochs


def test_seed_fixes_order_and_flips(tmp_path):
    data = numbered(tmp_path, 40, flip=True)
    assert_same(take(iterate(data), 6), take(iterate(data), 6))
    other, batches = take(iterate(data, seed=4), 6), take(iterate(data), 6)
    assert labels_of(other) != labels_of(batches)

    def flips(batches):
        return [(batch["x1"][:, 0, 3, 0] > -1).tolist() for batch in batches]

    assert flips(other) != flips(batches)


# 8 divides no size: batches reach over the ends of epochs.
@pytest.mark.parametrize(("size", "steps"), [(60, 16), (3, 6), (1, 2)])
@pytest.mark.parametrize("count", [2, 8])
def test_processes_together_make_the_same_batches(tmp_path, size, steps, count):
    data = numbered(tmp_path, size, flip=True)
    alone = take(iterate(data, 8), steps)
    parts = [take(iterate(data, 8, index=index, count=count), steps) for index in range(count)]
    for step, whole in enumerate(alone):
        shards = [part[step] for part in parts]
        assert all(len(shard["x1"]) == 8 // count for shard in shards)
        assert_same([jax.tree.map(lambda *x: np.concatenate(x), *shards)], [whole])


def test_flips_mirror_half_of_the_images_anew_each_epoch(tmp_path):
    data = numbered(tmp_path, 120, flip=True)
    batches = take(iterate(data, 120), 10)
    flipped = np.zeros((10, 120), bool)
    for epoch, batch in enumerate(batches):
        left, right = batch["x1"][:, 0, 0, 0], batch["x1"][:, 0, 3, 0]
        value = ((10 + batch["condition"]["label"]) / 127.5 - 1).astype(np.float32)
        np.testing.assert_allclose(np.maximum(left, right), value, atol=1e-6)
        assert (np.minimum(left, right) == -1).all()
        flipped[epoch, batch["condition"]["label"]] = right > left
    assert 0.43 < flipped.mean() < 0.57  # 1200 fair coins: 5 standard deviations
    assert (np.abs(flipped.mean(1) - 0.5) < 0.25).all()  # in each epoch, too
    assert len({tuple(epoch) for epoch in flipped}) == 10


@pytest.mark.parametrize("done", [0, 1, 5])
def test_resume_continues_bit_for_bit(tmp_path, done):
    """Also in other processes than before."""
    data = numbered(tmp_path, 40, flip=True)
    following = take(iterate(data), done + 6)[done:]
    assert_same(take(iterate(data, first_step=done), 6), following)
    half = [jax.tree.map(lambda x: x[2:], batch) for batch in following]
    assert_same(take(iterate(data, first_step=done, index=1, count=2), 6), half)


def test_rows_may_be_any(tmp_path):
    data = numbered(tmp_path, 40, flip=True)
    rows = np.array([0, 3, 4])
    ours = take(train_iterator(data, space="pixels", channels=1, batch_size=6, seed=3, rows=rows), 4)
    assert_same(ours, [jax.tree.map(lambda x: x[rows], batch) for batch in take(iterate(data, 6), 4)])


def test_worker_processes_change_nothing_but_the_reader(tmp_path):
    data = numbered(tmp_path, 40, flip=True)
    expected = take(iterate(data, index=1, count=2), 7)
    data.num_workers = 2
    workers = iterate(data, index=1, count=2, first_step=3)
    assert_same(take(workers, 4), expected[3:])
    workers.close()


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_image_ends_training_with_its_name(tmp_path, num_workers):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"no image")
    data = default().data
    data.source, data.path, data.num_workers = "folder", str(tmp_path), num_workers
    iterator = iterate(data)
    with pytest.raises(UserError, match=r"bad\.png"):
        next(iterator)
    iterator.close()


def test_errors_before_reading(tmp_path):
    data = default().data
    data.source, data.path = "folder", str(tmp_path / "nowhere")
    for call in (lambda: iterate(data), lambda: load_images(data, "test", channels=1)):
        with pytest.raises(UserError, match="nowhere"):
            call()


def test_load_images_in_source_order_without_flip(tmp_path):
    data = numbered(tmp_path, 10, flip=True)
    images, labels = load_images(data, "test", channels=1)
    assert images.shape == (10, 4, 4, 1) and images.dtype == np.uint8 and labels.dtype == np.int32
    assert labels.tolist() == list(range(10))
    assert images[:, 2, 0, 0].tolist() == list(range(10, 20)) and not images[:, :, 1:].any()
    for limit, expected in ((4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10))), (1, [0])):
        images, labels = load_images(data, "test", channels=3, limit=limit)
        assert labels.tolist() == expected and images[:, 0, 0, 2].tolist() == [10 + i for i in expected]


def test_load_images_crops_the_middle(tmp_path):
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, 4:12] = [200, 100, 50]
    (tmp_path / "test" / "only").mkdir(parents=True)
    Image.fromarray(stripes).save(tmp_path / "test" / "only" / "0.png")
    data = default().data
    data.source, data.path = "folder", str(tmp_path)
    images, labels = load_images(data, "test", channels=3)
    assert (images == [[[[200, 100, 50]]]]).all() and labels.tolist() == [0]
    grey, _ = load_images(data, "test", channels=1)
    assert (grey == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)).all()


def test_worker_processes_end_with_a_killed_run():
    code = """
import multiprocessing
from dar_jax import config
from dar_jax.data.pipeline import train_iterator

if __name__ == "__main__":
    data = config.default().data
    data.num_workers = 2
    batches = train_iterator(data, space="pixels", channels=1, batch_size=8, seed=0)
    for _ in range(4):
        next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    input()
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        command = [sys.executable, script.name]
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        workers = [pathlib.Path("/proc", pid) for pid in run.stdout.readline().decode().split()]
        were_alive = [worker.exists() for worker in workers]
        run.kill()
        run.wait()
    assert were_alive == [True, True]
    deadline = time.monotonic() + 10
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if worker.exists()]
