"""The same number from any number of devices and processes; references of all kinds; the table against NumPy."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits

from dar_jax import sharding
from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.evaluation.features import Features, extract_all
from dar_jax.evaluation.metrics import Collector, FeatureSet, read_reference, score, split_reference, warn_if_few
from dar_jax.evaluation.statistics import Statistics, kernel_distance, precision_recall
from tests.training import tiny

NUM_FEATURES = 24


def network(name="test", pool_size=NUM_FEATURES, channels=1):
    """Random convolutions of 8 x 8 images; as "inception" it has the other outputs of that network, too."""
    rng = np.random.default_rng(0)
    kernels = [
        rng.normal(size=shape).astype(np.float32) / 3 for shape in ((3, 3, channels, 8), (3, 3, 8, NUM_FEATURES))
    ]
    spread = rng.normal(size=(NUM_FEATURES, pool_size)).astype(np.float32)

    def extract(images):
        x = images.astype(jnp.float32) / 127.5 - 1
        for kernel in kernels:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout))
        pool = x.mean(axis=(1, 2))
        if name != "inception":
            return {"pool": pool}
        return {"pool": pool @ spread, "spatial": x[:, 0].reshape(len(x), -1), "logits": pool * 5}

    return Features(name, jax.jit(extract), batch_size=32)


def digits(count, seed=0):
    """Scikit-learn's digits, shifted and mirrored at random, as there are fewer than 2,000 of them."""
    rng = np.random.default_rng(seed)
    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    images = images[rng.integers(0, len(images), count)]
    images = np.stack([np.roll(image, rng.integers(-1, 2), axis=1)[:, :: rng.choice([-1, 1])] for image in images])
    return images[..., None]


def collect(features, images, mesh, batch=500):
    collector = Collector()
    for start in range(0, len(images), batch):
        collector.add(extract_all(features, images[start : start + batch], mesh))
    return collector.result()


def distance(mesh):
    """Of 2,000 digits from 1,000 others."""
    features = network()
    with sharding.use(mesh):
        sets = collect(features, digits(1000, seed=1), mesh), collect(features, digits(2000), mesh)
    return score(features, *sets)["fd_test"]


def worker():
    """One of several processes; each writes the distance to a file, as gloo prints on stdout when it likes."""
    port, count, index = (int(word) for word in sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    found = distance(sharding.make_mesh(default().mesh))
    pathlib.Path(sys.argv[4]).write_text(json.dumps([found, jax.device_count(), jax.process_count()]))


@pytest.fixture(scope="module")
def one_device():
    return distance(tiny.make_mesh(1, 1))


def test_distance_against_scipy(one_device):
    features = network()
    a, b = (np.asarray(features.extract(images)["pool"], np.float64) for images in (digits(1000, seed=1), digits(2000)))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    np.testing.assert_allclose(one_device, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 2)])
def test_devices_do_not_change_the_distance(one_device, shape):
    np.testing.assert_allclose(distance(tiny.make_mesh(*shape)), one_device, rtol=1e-6)


def test_processes_do_not_change_the_distance(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environment = {**os.environ, "XLA_FLAGS": flags}
    code = "from tests.evaluation.test_metrics import worker; worker()"
    commands = [[sys.executable, "-c", code, str(port), "2", str(i), str(tmp_path / str(i))] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    for i, process in enumerate(processes):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        found, devices, count = json.loads((tmp_path / str(i)).read_text())
        assert (devices, count) == (4, 2)
        np.testing.assert_allclose(found, one_device, rtol=1e-6)


def test_features_of_any_number_of_images():
    """Also when batches do not divide over the devices: none is lost, repeated or out of order."""
    features, images, mesh = network(), digits(300), tiny.make_mesh(4, 2)
    expected = np.asarray(features.extract(images)["pool"])
    for count in (1, 7, 256, 257, 300):
        found = extract_all(features, images[:count], mesh)["pool"]
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-6)


def test_scores_and_when_there_are_which():
    """Every number appears when its inputs do; the values are those of the functions that have tests of their own."""
    features, mesh = network("inception"), tiny.make_mesh(1, 1)
    reference, samples = collect(features, digits(60, seed=1), mesh), collect(features, digits(80), mesh)
    full = score(features, reference, samples)
    assert list(full) == ["fid", "sfid", "is", "kid", "precision", "recall"]
    moments_only = reference._replace(pool=None, logits=None)
    assert list(score(features, moments_only, samples)) == ["fid", "sfid", "is"]
    pool_only = moments_only._replace(moments={"pool": reference.moments["pool"]})
    assert list(score(features, pool_only, samples)) == ["fid", "is"]
    swapped = reference._replace(moments={**reference.moments, "spatial": samples.moments["spatial"]})
    assert score(features, swapped, samples)["sfid"] < 1e-6 < full["sfid"]
    assert score(features, swapped, samples)["fid"] == full["fid"]
    chunk, pool = np.float64(samples.logits), np.float64(samples.pool)
    p = np.exp(chunk) / np.exp(chunk).sum(1, keepdims=True)
    np.testing.assert_allclose(full["is"], np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), 1))), rtol=1e-5)
    assert full["kid"] == pytest.approx(kernel_distance(np.float64(reference.pool), pool), rel=1e-5)
    assert (full["precision"], full["recall"]) == precision_recall(reference.pool, samples.pool)
    assert full["precision"] != full["recall"]


def test_reference_is_read_and_made(tmp_path):
    features, mesh, images = network("inception", 2048), tiny.make_mesh(1, 1), digits(40)
    made = collect(features, images, mesh)
    np.savez(tmp_path / "images.npz", images)
    read = read_reference(str(tmp_path / "images.npz"), features, mesh, (8, 8))
    np.testing.assert_allclose(read.moments["spatial"].covariance, made.moments["spatial"].covariance)
    np.testing.assert_array_equal(read.pool, made.pool)

    stored = {"mu": np.ones(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "both.npz", images, **stored)
    read = read_reference(str(tmp_path / "both.npz"), features, mesh, (8, 8))
    assert list(read.moments) == ["pool"] and read.moments["pool"].mean[0] == 1  # as stored, not of arr_0
    np.testing.assert_array_equal(read.pool, made.pool)

    np.savez(tmp_path / "moments.npz", **stored)
    read = read_reference(str(tmp_path / "moments.npz"), features, mesh, (8, 8))
    assert read.pool is None and read.moments["pool"].count == 0

    # Stored moments are the Inception network's; another network makes its own.
    read = read_reference(str(tmp_path / "both.npz"), network(), mesh, (8, 8))
    assert read.moments["pool"].mean.shape == (NUM_FEATURES,)


def test_references_that_do_not_fit(tmp_path):
    features, mesh = network("inception", 2048), tiny.make_mesh(1, 1)
    np.savez(tmp_path / "images.npz", digits(5))
    np.savez(tmp_path / "other.npz", mu=np.ones(64), sigma=np.eye(64))
    np.savez(tmp_path / "moments.npz", mu=np.ones(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "nothing.npz", x=np.ones(3))
    for name, network_, size, message in (
        ("images", features, (16, 16), "images of 8 x 8, but they are compared with images of 16 x 16"),
        ("other", features, (8, 8), 'moments of 64 "pool" features, but the Inception network has 2048'),
        ("moments", network(), (8, 8), 'has no images "arr_0"'),
        ("nothing", features, (8, 8), 'has no images "arr_0". Valid: x'),
    ):
        with pytest.raises(UserError, match=message):
            read_reference(str(tmp_path / f"{name}.npz"), network_, mesh, size)


def test_reference_of_a_split():
    config = tiny.make_config()
    made = split_reference(config, network(), tiny.make_mesh(1, 1))
    assert made.moments["pool"].count == len(made.pool) == 355
    assert made.moments["pool"].mean.shape == (NUM_FEATURES,)


@pytest.mark.parametrize(("count", "known", "few"), [(24, 0, True), (25, 0, False), (100, 24, True), (100, 100, False)])
def test_too_few_images_are_told(count, known, few):
    lines, moments = [], {"pool": Statistics(known, np.zeros(24), np.eye(24))}
    warn_if_few(FeatureSet(moments, None, None), count, lines.append)
    assert len(lines) == few
    assert not few or lines[0].startswith("warning: 24 images are too few for 24 features")


def test_nan_features_are_refused():
    with pytest.raises(UserError, match="1 of 2 images are not finite"):
        Collector().add({"pool": np.array([[0, np.nan], [1, 2]], np.float32)})
