"""The convnet's features: good enough to read digits, comparable in scale, the same on every path to them."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from dar_jax.errors import UserError
from dar_jax.evaluation import features as module
from dar_jax.evaluation.features import convnet_features
from dar_jax.evaluation.statistics import Accumulator, frechet_distance


def statistics(features):
    accumulator = Accumulator()
    accumulator.update(features)
    return accumulator.statistics()


def pool(features, images):
    return np.asarray(features.extract(images)["pool"])


@pytest.fixture(scope="module")
def digits():
    """Train images, train labels, test images, test labels."""
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order].astype(np.int32)
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The features of the digits, their cache and the lines logged."""
    cache, lines = tmp_path_factory.mktemp("run") / "convnet.npz", []
    features = convnet_features(digits[0], digits[1], 10, seed=0, cache=cache, log=lines.append)
    return features, cache, lines


@pytest.fixture
def training(monkeypatch):
    """Replaces the training by a count of its calls."""
    calls = []

    def train(net, images, labels, seed, log):
        calls.append(seed)
        shapes = jax.eval_shape(net.init, jax.random.key(0), images[:1])["params"]
        return {"params": jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), "scale": np.float32(1)}

    monkeypatch.setattr(module, "_train", train)
    return calls


def test_a_linear_map_of_the_features_reads_held_out_digits(digits, trained):
    train_images, train_labels, test_images, test_labels = digits
    x, x_test = (np.asarray(pool(trained[0], images), np.float64) for images in (train_images, test_images))
    assert x.shape == (1437, 64)
    weights = np.linalg.solve(x.T @ x + np.eye(64), x.T @ (2 * np.eye(10)[train_labels] - 1))
    assert np.mean((x_test @ weights).argmax(1) == test_labels) > 0.95


def test_the_features_have_unit_variance_on_average(digits, trained):
    assert trained[0].name == "convnet"
    np.testing.assert_allclose(pool(trained[0], digits[0]).var(axis=0).mean(), 1, rtol=0.03)


def test_one_line_tells_accuracy_and_seconds(trained):
    (line,) = trained[2]
    assert "100.0% of training images" in line or "99." in line
    assert "\n" not in line and line.endswith(" s")


def test_the_distance_orders_real_degraded_and_noise(digits, trained):
    train, _, test, labels = digits
    rng = np.random.default_rng(0)
    noisy = np.clip(test + rng.normal(size=test.shape) * 60, 0, 255).astype(np.uint8)
    noise = rng.integers(0, 256, test.shape).astype(np.uint8)
    reference = statistics(pool(trained[0], train))
    real, degraded, one_class, nothing = (
        frechet_distance(statistics(pool(trained[0], images)), reference)
        for images in (test, noisy, test[labels == 0], noise)
    )
    assert 2 * real < degraded < one_class
    assert 5 * degraded < nothing


def test_jit_and_shards_change_nothing(digits, trained):
    features = pool(trained[0], digits[2][:64])
    assert features.dtype == np.float32
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    images = jax.device_put(digits[2][:64], NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        sharded = jax.jit(trained[0].extract)(images)["pool"]
    assert sharded.sharding.shard_shape(sharded.shape) == (64 // len(jax.devices()), 64)
    np.testing.assert_allclose(sharded, features, rtol=1e-5, atol=1e-5)


def test_the_seed_decides_and_the_mesh_of_the_run_does_not(digits, trained, monkeypatch):
    first, devices, initial = pool(trained[0], digits[2]), set(), module._initial

    def spy(rng, shape):
        devices.add(jax.sharding.get_abstract_mesh().size)
        return initial(rng, shape)

    monkeypatch.setattr(module, "_initial", spy)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), ("data",))):
        same, other = (convnet_features(digits[0], digits[1], 10, seed=seed, cache=None) for seed in (0, 1))
    np.testing.assert_array_equal(pool(same, digits[2]), first)
    assert np.abs(pool(other, digits[2]) - first).max() > 0.1
    assert devices == {1}


def test_the_cache_gives_the_same_features_without_training(digits, trained, training):
    features, cache, _ = trained
    assert [file.name for file in cache.parent.iterdir()] == ["convnet.npz"]
    lines = []
    again = convnet_features(digits[0], digits[1], 10, seed=0, cache=cache, log=lines.append)
    assert not training
    assert len(lines) == 1 and str(cache) in lines[0]
    np.testing.assert_array_equal(pool(again, digits[2]), pool(features, digits[2]))


@pytest.mark.parametrize("change", ["seed", "num_classes", "images", "labels", "count", "version"])
def test_a_cache_of_other_arguments_is_not_used_but_replaced(digits, trained, training, monkeypatch, tmp_path, change):
    cache = tmp_path / "convnet.npz"
    cache.write_bytes(trained[1].read_bytes())
    images, labels = digits[0].copy(), digits[1].copy()
    seed, num_classes = 0, 10
    if change == "seed":
        seed = 1
    elif change == "num_classes":
        num_classes = 11
    elif change == "images":
        images[-1, -1, -1, -1] += 1
    elif change == "labels":
        labels[-1] = (labels[-1] + 1) % 10
    elif change == "count":
        images, labels = images[:-1], labels[:-1]
    else:
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    for _ in range(2):
        convnet_features(images, labels, num_classes, seed=seed, cache=cache)
    assert training == [seed]  # the second call finds the first one's weights


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "array"])
def test_a_damaged_cache_is_replaced_with_one_line(digits, trained, training, tmp_path, damage):
    cache = tmp_path / "convnet.npz"
    content = trained[1].read_bytes()
    middle = len(content) // 2
    cache.write_bytes(
        {
            "empty": b"",
            "text": b"not weights",
            "truncated": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "array": b"",
        }[damage]
    )
    if damage == "array":
        with open(cache, "wb") as file:
            np.save(file, np.zeros(3))
    lines = []
    for _ in range(2):
        convnet_features(digits[0], digits[1], 10, seed=0, cache=cache, log=lines.append)
    assert training == [0]
    assert len(lines) == 2 and f"cannot read {cache}" in lines[0] and "weights from" in lines[1]
    assert list(tmp_path.iterdir()) == [cache]


@pytest.mark.parametrize(("side", "channels"), [(8, 3), (9, 1), (33, 3), (64, 1)])
def test_sizes_from_8_to_64_have_a_network(training, side, channels):
    images = np.zeros((5, side, side, channels), np.uint8)
    features = convnet_features(images, np.zeros(5, np.int32), 10, seed=0, cache=None)
    assert jax.eval_shape(features.extract, images)["pool"].shape == (5, 64)


def test_odd_sides_and_colours_train_too(monkeypatch):
    monkeypatch.setattr(module, "NUM_STEPS", 1)
    monkeypatch.setattr(module, "NUM_MEASURED", 1)
    images = np.random.default_rng(0).integers(0, 256, (10, 25, 25, 3)).astype(np.uint8)
    features = pool(convnet_features(images, np.arange(10, dtype=np.int32) % 3, 3, seed=0, cache=None), images)
    assert features.shape == (10, 64)
    assert np.isfinite(features).all() and np.var(features, axis=0).max() > 0


@pytest.mark.parametrize("shape", [(10, 7, 7, 1), (10, 65, 65, 3), (10, 8, 9, 1)])
def test_sizes_it_is_not_made_for_are_refused_before_training(training, shape):
    with pytest.raises(UserError, match=f"not {shape[1]} x {shape[2]}"):
        convnet_features(np.zeros(shape, np.uint8), np.zeros(10, np.int32), 10, seed=0, cache=None)
    assert not training


def test_images_of_another_range_or_size_are_refused(trained):
    with pytest.raises(ValueError, match=r"uint8 images \[B, 8, 8, 1\]"):
        trained[0].extract(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"uint8 images \[B, 8, 8, 1\]"):
        trained[0].extract(np.zeros((2, 7, 7, 1), np.uint8))
