"""The FID Inception network against an independent PyTorch one, its resize against loops over pixels."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from dar_jax.errors import UserError
from dar_jax.pretrained import inception
from tests.parity.torch_inception import random_inception


def resize_one(image):
    """[H, W, C] uint8 -> float64 [299, 299, C], pixel by pixel, as TensorFlow 1 defines ResizeBilinear.

    Its sample positions are float32, with an error of up to 2e-5 pixels; all else is exact here.
    """
    height, width, channels = image.shape
    image, out = image.astype(np.float64), np.empty((299, 299, channels))
    scale_y, scale_x = (np.float32(size) / np.float32(299) for size in (height, width))
    for i in range(299):
        for j in range(299):
            y, x = float(np.float32(i) * scale_y), float(np.float32(j) * scale_x)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = y - top, x - left
            above = (1 - b) * image[top, left] + b * image[top, right]
            below = (1 - b) * image[bottom, left] + b * image[bottom, right]
            out[i, j] = (1 - a) * above + a * below
    return out


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 28, 3), (256, 256, 3), (299, 299, 1), (300, 640, 1), (1, 1, 3)])
def test_resize_is_that_of_tensorflow_1(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    got = np.asarray(jax.jit(inception.resize)(images.astype(np.float32)))
    assert got.dtype == np.float32
    for image, resized in zip(images, got, strict=True):
        np.testing.assert_allclose(resized / 255, resize_one(image) / 255, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def reference():
    return random_inception()


def test_every_output_equals_pytorch(reference):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3)).astype(np.uint8)
    images[1, :20] //= 8  # else all noise looks alike to the network
    params = inception.params_from_torch(reference.state_dict())
    got = jax.jit(inception.extract)(params, images)
    x = np.stack([resize_one(image) for image in images]) / 128 - 1
    with torch.no_grad():
        expected = reference(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2))
    assert {name: array.shape for name, array in got.items()} == {
        "pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008),
    }  # fmt: skip
    for name, array in expected.items():
        array = array.numpy()
        assert np.linalg.norm(got[name] - array) < 1e-5 * np.linalg.norm(array), name
        # Relative to what tells the two images apart, too, for that is all a distance sees.
        assert np.linalg.norm(got[name] - array) < 1e-4 * np.linalg.norm(array[0] - array[1]), name


def test_grey_is_repeated(monkeypatch):
    seen = []
    monkeypatch.setattr(inception.InceptionV3, "__call__", lambda self, x: seen.append(x))
    grey = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1)).astype(np.uint8)
    inception.extract({}, grey)
    inception.extract({}, np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(*seen)
    assert seen[0].shape == (1, 299, 299, 3) and seen[0].min() >= -1 and seen[0].max() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.pop("Mixed_7c.branch3x3_2b.bn.running_var"),
            'lack the key "Mixed_7c.branch3x3_2b.bn.running_var"',
        ),
        (lambda d: d.pop("fc.bias"), 'lack the key "fc.bias"'),
        (lambda d: d.update({"AuxLogits.fc.bias": np.ones(1000)}), 'have the key "AuxLogits.fc.bias"'),
        (lambda d: d.update({"fc.weight": np.ones((1000, 2048))}), r'"fc.weight" has shape \(1000, 2048\)'),
    ],
)
def test_other_weights_are_named(reference, change, message):
    state_dict = reference.state_dict()
    change(state_dict)
    with pytest.raises(UserError, match=message):
        inception.params_from_torch(state_dict)


def convert(*flags):
    command = [sys.executable, "-m", "dar_jax.convert", "--kind=inception", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_door_converts(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "inception.pth")
    flags = [f"--input={tmp_path}/inception.pth", f"--output={tmp_path}/new/inception.npz"]
    result = convert(*flags)
    assert result.returncode == 0, result.stderr
    read = inception.read_params(f"{tmp_path}/new/inception.npz")
    jax.tree.map(np.testing.assert_array_equal, read, inception.params_from_torch(reference.state_dict()))
    result = convert(flags[0], f"--output={tmp_path}/inception")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "must end in .npz" in result.stderr


def test_missing_and_damaged_weights_say_where_to_get_them(tmp_path):
    np.savez(tmp_path / "other.npz", kernel=np.ones(3))
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-30])
    (tmp_path / "weights.npy").write_bytes(b"no weights")
    for name, message in {
        "none.npz": "are no file", "other.npz": "does not hold", "damaged.npz": "cannot be read",
        "weights.npy": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"{message}.*pytorch-fid/releases.*--kind=inception"):
            inception.read_params(str(tmp_path / name))
