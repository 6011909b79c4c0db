"""Measures of detail against loops that follow their definitions, and against images whose spectrum is known."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from dar_jax.errors import UserError
from dar_jax.evaluation import detail
from dar_jax.evaluation.detail import collect, compare, means, measures, per_image


def noise(count, side, deviation=20.0, seed=0):
    """White noise around 128, rounded: float64 [count, side, side, 1] of whole numbers."""
    return 128 + np.round(np.random.default_rng(seed).normal(0, deviation, (count, side, side, 1)))


def natural(count, side, seed=0):
    """Images whose amplitude falls by 1 / f, as that of photographs, uint8 [count, side, side, 1]."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    f[0, 0] = np.inf
    white = np.random.default_rng(seed).normal(size=(count, side, side))
    x = np.fft.ifft2(np.fft.fft2(white) / f).real
    return to_uint8(128 + x * (30 / x.std()))


def to_uint8(x):
    return np.clip(np.round(x), 0, 255).astype(np.uint8).reshape(*x.shape[:3], -1)


def measured(images):
    return collect([per_image(images)], images.shape[1:3])


def means_of(images):
    return means(measured(images))


def symmetric_spectrum(grey):
    """|FFT2|^2 / (H W) with frequency 0 in the middle; the first row or column of an even side once more at the end."""
    power = np.fft.fftshift(np.abs(np.fft.fft2(grey)) ** 2) / grey.size
    return np.pad(power, [(0, 1 - side % 2) for side in grey.shape], mode="wrap")


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (9, 3), (24, 3), (33, 1)])
def test_profile_and_energy_against_loops(side, channels):
    image = np.random.default_rng(side).integers(0, 256, (side, side, channels)).astype(np.uint8)
    found = per_image(image[None])
    grey = np.float64(image[..., 0])
    if channels == 3:
        grey = 0.299 * grey + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    spectrum, middle = symmetric_spectrum(grey), side // 2
    in_ring = [[] for _ in range(middle + 1)]
    radii = [[] for _ in range(middle + 1)]
    for i in range(2 * middle + 1):
        for j in range(2 * middle + 1):
            radius = np.sqrt((i - middle) ** 2 + (j - middle) ** 2)
            if int(radius) <= middle:
                in_ring[int(radius)].append(spectrum[i, j])
                radii[int(radius)].append(radius)
    assert found["profile"].shape == (1, middle + 1)
    np.testing.assert_allclose(found["profile"][0], [np.mean(ring) for ring in in_ring], rtol=1e-10)
    np.testing.assert_allclose(detail.rings(side, side).radius, [np.mean(ring) for ring in radii], rtol=1e-10)

    power, sums = np.abs(np.fft.fft2(grey)) ** 2 / grey.size, [0, 0, 0]
    for u in range(side):
        for v in range(side):
            radius = np.hypot(min(u, side - u), min(v, side - v)) / (side / 2)
            for i, limit in enumerate((0, 1 / 4, 1 / 2)):
                sums[i] += power[u, v] * (radius > limit)
    np.testing.assert_allclose(found["energy"][0], sums, rtol=1e-10)
    np.testing.assert_allclose(found["energy"][0, 0], grey.size * grey.var(), rtol=1e-10)
    mean = means(collect([per_image(image[None]), per_image(image[None])], (side, side)))
    np.testing.assert_allclose(measures(mean)["hf_quarter"], sums[1] / sums[0], rtol=1e-10)
    np.testing.assert_allclose(measures(mean)["hf_half"], sums[2] / sums[0], rtol=1e-10)


def test_distance_against_loops():
    p, q, side = np.random.default_rng(0).uniform(1, 2, 17), np.random.default_rng(1).uniform(1, 2, 17), 32
    bands = {"lsd_low": [], "lsd_mid": [], "lsd_high": []}
    for k in range(1, 17):
        name = "lsd_low" if k / 16 < 1 / 3 else "lsd_mid" if k / 16 < 2 / 3 else "lsd_high"
        bands[name].append(abs(10 * np.log(p[k] / q[k]) / np.log(10)))
    found = detail.log_spectral_distance(p, q, (side, side))
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        {name: np.mean(x) for name, x in bands.items()}, rel=1e-10
    )
    # A tenth of the power, that is -10 dB, in the highest third alone; the brightness (ring 0) does not count.
    q = np.where(np.arange(17) < 11, p, p / 10)
    q[0] *= 7
    found = detail.log_spectral_distance(p, q, (side, side))
    assert {name: float(x) for name, x in found.items()} == pytest.approx({"lsd_low": 0, "lsd_mid": 0, "lsd_high": 10})


@pytest.mark.parametrize(("side", "period", "reach"), [(64, 8, 3), (64, 16, 1), (28, 8, 1), (256, 8, 4), (37, 16, 1)])
def test_grid_index_against_loops(side, period, reach):
    images = natural(3, side, seed=side)
    kept = side // period * period
    first = (side - kept) // 2
    power = np.zeros((kept, kept))
    for image in images:
        power += np.abs(np.fft.fft2(image[first : first + kept, first : first + kept, 0])) ** 2 / kept**2 / 3
    ratios = []
    for axis in (power[:, 0], power[0]):
        for multiple in range(1, period // 2 + 1):
            peak = multiple * kept // period
            around = [axis[(peak + i) % kept] for i in range(-reach, reach + 1) if i]
            ratios.append(axis[peak] / np.exp(np.median(np.log(around))))
    found = measures(means_of(images))[f"grid_{period}"]
    np.testing.assert_allclose(found, 10 * np.log10(np.mean(ratios)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [8, 33])
def test_laplacian_against_scipy(side):
    image = np.random.default_rng(0).integers(0, 256, (2, side, side, 1)).astype(np.uint8)
    expected = [ndimage.laplace(np.float64(x[..., 0]), mode="mirror").var() for x in image]
    np.testing.assert_allclose(per_image(image)["laplacian"], expected, rtol=1e-10)


@pytest.mark.parametrize("side", [32, 33])
def test_white_noise_is_flat_at_its_variance(side):
    found = means_of(to_uint8(noise(600, side)))
    level = 20**2 + 1 / 12  # and that of rounding
    np.testing.assert_allclose(found["profile"][1:], level, rtol=0.05)
    assert np.mean(found["profile"][4:]) == pytest.approx(level, rel=0.005)
    u = np.abs(np.fft.fftfreq(side))
    radius = 2 * np.hypot(u[:, None], u)  # over Nyquist
    shares = [np.sum(radius > limit) / (side**2 - 1) for limit in (1 / 4, 1 / 2)]
    found = measures(found)
    assert [found["hf_quarter"], found["hf_half"]] == pytest.approx(shares, rel=0.005)
    # The Laplacian adds 4 pixels and 16 times one: 20 variances. At the borders a mirrored pixel counts twice.
    assert found["laplacian"] == pytest.approx(20 * level, rel=0.02)
    assert abs(found["grid_8"]) < 1


@pytest.mark.parametrize(("u", "v"), [(3, 0), (0, 5), (4, 7), (16, 0)])
def test_a_sinusoid_is_in_its_ring(u, v):
    side, y, x = 32, *np.mgrid[:32, :32]
    images = to_uint8(np.stack([128 + 100 * np.cos(2 * np.pi * (u * y + v * x) / side)] * 2))
    found = means_of(images)
    ring = int(np.hypot(u, v))
    others = np.delete(found["profile"][1:], ring - 1)
    assert found["profile"][ring] > 1000 * others.max()
    assert found["profile"][0] == pytest.approx(side**2 * 128**2, rel=1e-3)
    share = measures(found)["hf_quarter"]
    assert share == pytest.approx(float(np.hypot(u, v) > 4), abs=1e-3)


@pytest.mark.parametrize("width", [48, 20])
def test_rings_of_images_that_are_not_square(width):
    """A wave of 4 pixels falls into the same ring along either axis, whatever the other side."""
    wave = 128 + 100 * np.cos(2 * np.pi * np.arange(width) / 4)
    for side in (20, 60):
        images = np.broadcast_to(wave, (2, side, width))[..., None]
        for turned in (images, images.transpose(0, 2, 1, 3)):
            found = means_of(to_uint8(turned))["profile"]
            shorter = min(side, width)
            assert len(found) == shorter // 2 + 1 and np.argmax(found[1:]) + 1 == shorter // 4


def test_box_blur_lowers_the_spectrum_by_its_response():
    """|sin(pi f 3) / (3 sin(pi f))|^2 along an axis; compared where the blur leaves more than rounding."""
    side, images = 64, noise(300, 64, deviation=40)
    blurred = ndimage.uniform_filter(images[..., 0], size=(0, 3, 3), mode="wrap")[..., None]
    results = compare({"reference": measured(to_uint8(images)), "samples": measured(to_uint8(blurred))})
    f = np.fft.fftfreq(side)
    box = (1 + 2 * np.cos(2 * np.pi * f)) / 3
    response = (box[:, None] * box) ** 2
    share = response[np.hypot(f[:, None], f) > 1 / 4].sum() / (response.sum() - 1)
    response = np.pad(np.fft.fftshift(response), (0, 1), mode="wrap")  # also at + Nyquist
    u = np.arange(-32, 33)
    radius = np.hypot(u[:, None], u)
    expected = np.array([10 * np.log10(response[radius.astype(int) == k].mean()) for k in range(1, 33)])
    clear = expected > -15
    assert 15 < clear.sum() < 32
    np.testing.assert_allclose(np.array(results["samples"]["ratio_db"])[clear], expected[clear], atol=0.3)
    scores = results["samples"]["scores"]
    assert scores["lsd_low"] == pytest.approx(-expected[:10].mean(), abs=0.2)
    assert scores["lsd_low"] < scores["lsd_mid"] < scores["lsd_high"]
    assert scores["hf_half"] == pytest.approx(share, rel=0.02) and share < 0.2
    assert scores["laplacian"] < results["reference"]["scores"]["laplacian"] / 20


@pytest.mark.parametrize("side", [64, 60])
def test_grid_index_sees_grids_and_not_sharpness(side):
    images = natural(200, side).astype(np.float64)
    sharp = images + 1.0 * (images - ndimage.gaussian_filter(images, (0, 1, 1, 0), mode="wrap"))
    tiles = images + 6 * (np.arange(side) % 8 == 3)[:, None, None]
    sharp, tiles, plain = (measures(means_of(to_uint8(x))) for x in (sharp, tiles, images))
    assert sharp["hf_quarter"] > 1.3 * plain["hf_quarter"] and sharp["laplacian"] > 2 * plain["laplacian"]
    for name in ("grid_8", "grid_16"):
        assert abs(plain[name]) < 1.5 and abs(sharp[name] - plain[name]) < 0.3
        assert tiles[name] > plain[name] + 2
    wide = measures(means_of(to_uint8(images + 12 * (np.arange(side) % 16 == 3)[:, None, None])))
    assert wide["grid_16"] > plain["grid_16"] + 2


def test_intervals_hold_the_truth_and_chance_is_that_of_the_counts():
    """Over many draws of white noise: 95 % of the intervals hold the variance; a set of the same kind is at chance."""
    sets = {f"set{i}": measured(to_uint8(noise(100, 16, seed=i))) for i in range(61)}
    results = compare({"reference": sets.pop("set0"), **sets})
    expected = np.mean([results[name]["scores"]["laplacian"] for name in sets])
    held = [low < expected < high for low, high in (results[name]["intervals"]["laplacian"] for name in sets)]
    assert 0.85 < np.mean(held) <= 1
    found = np.array([results[name]["scores"]["lsd_high"] for name in sets])
    chance = results["reference"]["scores"]["lsd_high"]
    assert np.mean(found) == pytest.approx(chance, rel=0.35)
    low, high = results["reference"]["intervals"]["lsd_high"]
    assert low < chance < high < 3 * chance
    # Samples of the same seeds are resampled together: their difference is known better than either.
    students = {"teacher": sets["set1"], "twin": sets["set1"], "other": sets["set2"]}
    results = compare({"reference": sets["set3"], **students})
    assert results["twin"]["scores"]["lsd_high_teacher"] == 0
    assert results["twin"]["intervals"]["lsd_high_teacher"] == [0, 0]
    assert results["other"]["scores"]["lsd_high_teacher"] > 0 and "lsd_high_teacher" not in results["teacher"]["scores"]


def test_batches_do_not_matter_and_measures_that_sizes_do_not_allow():
    images = to_uint8(noise(10, 28))
    whole, parts = measured(images), collect(map(per_image, np.split(images, [3, 4])), (28, 28))
    for name, x in whole.rows.items():
        np.testing.assert_array_equal(parts.rows[name], x)
    assert set(whole.rows) == {"profile", "energy", "laplacian", "lines_8"}
    assert detail.not_available((28, 28), False) == {
        "grid_16": "the images are 28 x 28, below two periods (32 px)",
        "patch_fid": "the images are 28 x 28, below 299 px",
    }
    assert detail.not_available((299, 512), False) == {"patch_fid": "it needs --inception"}
    assert detail.not_available((299, 512), True) == {}
    with pytest.raises(UserError, match="images of 7 x 64 have no detail to measure"):
        detail.check_size((7, 64), "--samples")
    with pytest.raises(UserError, match="a set of 1 image"):
        measured(images[:1])


def test_images_of_one_colour_have_finite_measures():
    results = compare({name: measured(np.full((3, 32, 32, 3), value, np.uint8)) for name, value in
                       (("reference", 0), ("samples", 77))})  # fmt: skip
    assert np.isfinite(list(results["samples"]["scores"].values())).all()
    assert results["samples"]["scores"]["laplacian"] == pytest.approx(0, abs=1e-20)


def test_the_door_measures_files_without_inception(tmp_path):
    images = natural(40, 28)
    np.savez(tmp_path / "ref.npz", natural(60, 28, seed=1))
    for name, sigma in (("teacher", 0), ("routed", 0.3), ("residual", 0.8)):
        np.savez(tmp_path / f"{name}.npz", to_uint8(ndimage.gaussian_filter(np.float64(images), (0, sigma, sigma, 0))))
    flags = [f"--samples={tmp_path}/residual.npz", f"--reference={tmp_path}/ref.npz", f"--json={tmp_path}/out.json"]
    flags += ["--detail", f"--teacher_samples={tmp_path}/teacher.npz", f"--beside=routed={tmp_path}/routed.npz"]
    command = [sys.executable, "-m", "dar_jax.evaluate", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = {one["name"]: one for one in json.loads((tmp_path / "out.json").read_text())}
    assert result.stdout.splitlines()[0].split() == list(found) == ["reference", "teacher", "routed", "samples"]
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    for name in ("lsd_low", "lsd_high", "hf_quarter", "hf_half", "grid_8", "laplacian", "lsd_high_teacher"):
        value = found["samples"]["scores"][name]
        assert float(rows[name].split()[-2]) == pytest.approx(value, rel=1e-4)
    for name in ("lsd_high", "lsd_high_teacher"):
        assert 0 < found["routed"]["scores"][name] < found["samples"]["scores"][name] / 2
    low, high = found["reference"]["intervals"]["lsd_high"]
    assert f" {low:.2g} to {high:.2g} " in rows["lsd_high"]
    assert "grid_16: not available, the images are 28 x 28, below two periods (32 px)" in result.stdout
    assert "patch_fid: not available, the images are 28 x 28, below 299 px" in result.stdout
    for name in ("out.png", "out.pdf"):
        assert (tmp_path / name).stat().st_size > 5000 and f"wrote {tmp_path}/{name}" in result.stdout
