"""Sample and reference files in the ADM layout: what numpy reads and writes, and one clear line for what is wrong."""

import numpy as np
import pytest

from dar_jax.errors import UserError
from dar_jax.evaluation.sets import open_images, read_moments, write_set


def images(count=7, side=5, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels)).astype(np.uint8)


def moments(size=4, suffix=""):
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(size, size))
    return {f"mu{suffix}": rng.normal(size=size), f"sigma{suffix}": factor @ factor.T}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_numpy_are_read_in_batches(tmp_path, save):
    save(tmp_path / "x.npz", images(), np.arange(7))
    opened = open_images(str(tmp_path / "x.npz"), "--samples")
    assert opened.shape == (7, 5, 5, 3)
    batches = list(opened.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images())
    np.testing.assert_array_equal(np.concatenate(list(opened.batches(3, limit=4))), images()[:4])


def test_numpy_reads_what_is_written(tmp_path):
    path = str(tmp_path / "ref.npz")
    arrays = {**moments(), **moments(6, "_s")}
    write_set(path, images().shape, np.split(images(), [2, 5]), arrays, "--out")
    with np.load(path) as file:
        assert set(file.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_array_equal(file["arr_0"], images())
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name], array)
    read = read_moments(path, "--reference")
    assert {name: (m.count, m.mean.shape) for name, m in read.items()} == {"pool": (7, (4,)), "spatial": (7, (6,))}
    np.testing.assert_array_equal(read["pool"].covariance, arrays["sigma"])
    np.testing.assert_array_equal(read["spatial"].mean, arrays["mu_s"])
    assert [p.name for p in tmp_path.iterdir()] == ["ref.npz"]


def test_moments_alone_or_none(tmp_path):
    np.savez(tmp_path / "m.npz", **moments())
    read = read_moments(str(tmp_path / "m.npz"), "--reference")
    assert list(read) == ["pool"] and read["pool"].count == 0
    np.savez(tmp_path / "i.npz", images())
    assert read_moments(str(tmp_path / "i.npz"), "--reference") == {}


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield images()[:2]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_set(str(tmp_path / "x.npz"), (7, 5, 5, 3), broken(), {}, "--out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_1": images()}, 'no images "arr_0". Did you mean "arr_1"'),
        ({"arr_0": images() / np.float32(255)}, "arr_0 is float32, but images are uint8 from 0 to 255"),
        ({"arr_0": images().astype(np.int64)}, "arr_0 is int64"),
        ({"arr_0": images()[0]}, r"arr_0 has shape \[5, 5, 3\], but images are \[N, H, W, 1 or 3\]"),
        ({"arr_0": images(channels=4)}, r"shape \[7, 5, 5, 4\]"),
        ({"arr_0": images().transpose(0, 3, 1, 2).copy()}, r"shape \[7, 3, 5, 5\]"),
        ({"arr_0": images()[:0]}, r"shape \[0, 5, 5, 3\]"),
        ({"arr_0": np.asfortranarray(images())}, "Fortran order"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=f'--samples = "{tmp_path}/x.npz".*{message}'):
        open_images(str(tmp_path / "x.npz"), "--samples")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, '"mu" but no "sigma"; write both or neither'),
        ({**moments(), "sigma_s": np.eye(3)}, '"sigma_s" but no "mu_s"'),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r'"mu" has shape \[4\] and "sigma" \[5, 5\]'),
        ({"mu": np.zeros((1, 4)), "sigma": np.eye(4)}, r"must be \[F\] and \[F, F\]"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, '"mu" or "sigma" has NaN'),
    ],
)
def test_moments_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_moments(str(tmp_path / "ref.npz"), "--reference")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "missing"])
def test_damaged_files(tmp_path, damage, save):
    path = tmp_path / "x.npz"
    save(path, arr_0=images(), mu=np.zeros(2000), sigma=np.zeros((2000, 2000)))
    content = path.read_bytes()
    middle = 300  # inside arr_0
    path.write_bytes(
        {
            "cut": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "text": b"no zip",
            "empty": b"",
            "missing": b"",
        }[damage]
    )
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=r"(fetch or write it again|is no file)") as error:
        list(open_images(str(path), "--samples").batches(2))
    assert "\n" not in str(error.value)
    if damage != "flipped":
        with pytest.raises(UserError, match=r"(fetch or write it again|is no file)"):
            read_moments(str(path), "--reference")


def test_images_that_are_not_asked_for_may_not_be_damaged(tmp_path):
    """The checksum is of all of them, and the damage may as well be in those before."""
    np.savez(tmp_path / "x.npz", arr_0=images())
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        list(open_images(str(tmp_path / "x.npz"), "--samples").batches(2, limit=2))


def test_header_that_promises_more_than_there_is(tmp_path):
    write_set(str(tmp_path / "x.npz"), (70, 5, 5, 3), [images()], {}, "--out")
    with pytest.raises(UserError, match="is damaged"):
        list(open_images(str(tmp_path / "x.npz"), "--samples").batches(10))
