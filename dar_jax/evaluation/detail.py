"""How much fine detail images have: power spectra, their distance, energy at high frequencies, grids, sharpness.

Every measure but patch FID is a function of means over images of what `per_image` finds, float64 on the host. So images
are read batch by batch, and a few hundred numbers of each are kept: 2.8 KB at 256 px, 140 MB of 50,000 images.

Images are uint8 `[N, H, W, 1 or 3]` of at least 8 px. Colours become grey, .299 R + .587 G + .114 B, from 0 to 255, and
are not rounded. The power of a frequency is |FFT2|^2 / (H W): white noise of variance s^2 has the power s^2 everywhere.
There is no window. Opposite borders of an image therefore leak a cross that falls by 1 / f^2 into its spectrum. It is
in that of real images and of samples alike, and hides weak detail along the axes.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dar_jax.errors import UserError
from dar_jax.evaluation.statistics import Accumulator, Statistics, frechet_distance

MIN_SIDE = 8
PATCH = 299  # pixels, what the Inception network takes
PERIODS = (8, 16)  # pixels: the factor of common VAEs, and that times the patch size of the transformer
REACH = 4  # frequencies on each side of a peak to which it is compared, at most
FLOOR = 1e-6  # of a power in a logarithm or below a line; rounding to whole numbers alone has 1/12
CUTOFFS = {"hf_quarter": 1 / 4, "hf_half": 1 / 2}  # of Nyquist
UNITS = {"lsd_low": "dB", "lsd_mid": "dB", "lsd_high": "dB", "hf_quarter": "", "hf_half": "", "grid_8": "dB",
         "grid_16": "dB", "laplacian": "", "patch_fid": ""}  # fmt: skip
REFERENCE, TEACHER = "reference", "teacher"
RESAMPLES = 200
_SAMPLES_SEED, _REFERENCE_SEED, _CHANCE_SEED = range(3)


class Measured(NamedTuple):
    """What is kept of a set of N images.

    Attributes:
      size: height and width of its images.
      rows: what `per_image` returns, [N, ...] by name.
      patches: moments of the Inception features of their centres, None where there are none.
    """

    size: tuple[int, int]
    rows: dict[str, np.ndarray]
    patches: Statistics | None

    @property
    def count(self) -> int:
        return len(self.rows["profile"])


class Rings(NamedTuple):
    """The frequencies of images of one size, as `np.fft.rfft2` orders them, by their radius.

    The radius is in cycles per shorter side, N = min(H, W), so that Nyquist is N / 2 in every direction. Ring k holds
    the radii in [k, k + 1), for k = 0 ... N // 2. The corners beyond are left out of the rings.

    Attributes:
      ring: of every frequency, int [H (W // 2 + 1)]; N // 2 + 1 for those in the corners.
      weights: how often a frequency counts in the mean of its ring, [H (W // 2 + 1)]. rfft2 leaves out one of two
        conjugate frequencies. And of an even side the frequency N / 2 stands for -N / 2 also, as if its row or column
        were there twice: otherwise the spectrum would not be symmetric, and the mean radius half a bin too small.
      totals: the sum of the weights of a ring, [N // 2 + 1].
      radius: the mean radius of a ring, [N // 2 + 1].
      above: how often a frequency of the FFT, corners included, lies above 0 and above each of `CUTOFFS`, 0, 1 or 2,
        [H (W // 2 + 1), 3].
    """

    ring: np.ndarray
    weights: np.ndarray
    totals: np.ndarray
    radius: np.ndarray
    above: np.ndarray


@functools.lru_cache(maxsize=4)
def rings(height: int, width: int) -> Rings:
    """The rings of images of a size. For square ones the radius is sqrt(u^2 + v^2) of whole u and v."""
    shorter = min(height, width)
    u = np.abs(np.fft.fftfreq(height, 1 / height).round().astype(int))[:, None]
    v = np.arange(width // 2 + 1)
    radius = (np.sqrt((u * width) ** 2 + (v * height) ** 2) / max(height, width)).ravel()  # whole where it should be
    ring = np.minimum(radius.astype(int), shorter // 2 + 1)
    weights = (np.where(2 * u == height, 2.0, 1.0) * np.where(v == 0, 1, 2)).ravel()
    totals = np.bincount(ring, weights)[: shorter // 2 + 1]
    mean_radius = np.bincount(ring, weights * radius)[: shorter // 2 + 1] / totals
    times = np.broadcast_to(np.where((v == 0) | (2 * v == width), 1.0, 2.0), (height, len(v))).ravel()
    limits = [0, *(cutoff * shorter / 2 for cutoff in CUTOFFS.values())]
    above = times[:, None] * (radius[:, None] > limits)
    return Rings(ring, weights, totals, mean_radius, above)


def to_grey(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 1 or 3] -> float64 [...], 0 to 255, .299 R + .587 G + .114 B of colours."""
    x = images.astype(np.float64)
    return x[..., 0] if x.shape[-1] == 1 else x @ np.array([0.299, 0.587, 0.114])


def _power(spectrum: np.ndarray) -> np.ndarray:
    return spectrum.real**2 + spectrum.imag**2


def per_image(images: np.ndarray) -> dict[str, np.ndarray]:
    """What the measures need to know of each image.

    Args:
      images: uint8 [B, H, W, 1 or 3], of at least 8 px.

    Returns:
      float64 by name:
      profile: [B, N // 2 + 1], the mean power of every ring.
      energy: [B, 3], the sum of the power over the frequencies, corners included, of a radius above 0, 1/4 of Nyquist,
        and 1/2 of Nyquist. The first is H W times the variance of the pixels.
      laplacian: [B], the variance of the Laplacian, see `laplacian_variance`.
      lines_8, lines_16: [B, P, F], power along the axes for `grid_index`, if the images are of two periods or more.
    """
    height, width = images.shape[1:3]
    at, found = rings(height, width), []
    for image in images:
        grey = to_grey(image)
        power = _power(np.fft.rfft2(grey)).ravel() / grey.size
        sums = np.bincount(at.ring, at.weights * power)[: len(at.totals)]
        one = {"profile": sums / at.totals, "energy": power @ at.above, "laplacian": laplacian_variance(grey)}
        one |= {f"lines_{period}": _lines(grey, period) for period in PERIODS if min(height, width) >= 2 * period}
        found.append(one)
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def laplacian_variance(grey: np.ndarray) -> np.ndarray:
    """The variance over the pixels of the Laplacian of a grey image float64 [H, W], which noise and grids raise too.

    The kernel is 0 1 0 / 1 -4 1 / 0 1 0, and borders are mirrored without their pixel, both as in OpenCV's
    Laplacian(ksize=1), to which the image goes unrounded.
    """
    x = np.pad(grey, 1, mode="reflect")
    return (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * grey).var()


def _around_peaks(side: int, step: int, reach: int) -> np.ndarray:
    """The frequencies step, 2 step, ... up to Nyquist of `side` pixels, each before its neighbours, int [P, F].

    Neighbours are at most `reach` away, F = 1 + 2 reach. Those beyond Nyquist are mirrored, as the spectrum is.
    """
    offsets = np.array([0, *range(-reach, 0), *range(1, reach + 1)])
    found = np.arange(step, side // 2 + 1, step)[:, None] + offsets
    return np.minimum(found, side - found)


def _lines(grey: np.ndarray, period: int) -> np.ndarray:
    """Power along the vertical and the horizontal axis for `grid_index`, [period, 1 + 2 reach].

    It is that of the centre of the image that holds whole periods, because only there the multiples of 1 / period are
    frequencies of the FFT. The period is even, and each axis has period / 2 such peaks.
    """
    height, width = (side - side % period for side in grey.shape)
    top, left = (grey.shape[0] - height) // 2, (grey.shape[1] - width) // 2
    centre = grey[top : top + height, left : left + width]
    reach = max(min((min(height, width) // period - 1) // 2, REACH), 1)
    rows, columns = (_power(np.fft.rfft(centre.sum(axis=axis))) / centre.size for axis in (1, 0))
    return np.concatenate(
        [line[_around_peaks(side, side // period, reach)] for line, side in ((rows, height), (columns, width))]
    )


def grid_index(lines: np.ndarray) -> np.ndarray:
    """How far the spectrum along the axes stands out at the multiples of 1 / period up to Nyquist, in dB.

    Each of these peaks is divided by the median of the power around it: on both sides, at most `REACH` frequencies
    away, and less than halfway to the next peak where there is a frequency so near. The index is 10 log10 of the mean
    of these ratios over the peaks of both axes. It is about 0 without a grid, since a smooth spectrum has no peaks,
    whether it is sharpened or not. A pattern of period 8 repeats after 16 pixels as well and raises both indices. A
    pattern along the diagonals alone has no power on the axes and is not seen.

    Args:
      lines: "lines_8" or "lines_16" of `per_image`, mean over images, [..., P, F] with the peaks at [..., 0].

    Returns:
      [...].
    """
    # Of logarithms, because the mean of the middle two would be too large where the power falls steeply.
    logs = np.log(np.maximum(lines, FLOOR))
    ratios = np.exp(logs[..., 0] - np.median(logs[..., 1:], axis=-1))
    return 10 * np.log10(ratios.mean(axis=-1))


def log_ratio(profile: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """10 log10 of the ratio of two profiles [..., R], in dB, without ring 0, the brightness: [..., R - 1]."""
    return 10 * np.log10(np.maximum(profile[..., 1:], FLOOR) / np.maximum(reference[..., 1:], FLOOR))


def log_spectral_distance(profile: np.ndarray, reference: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The mean of |10 log10 (P / P_reference)| over the rings in each third of Nyquist, in dB.

    Args:
      profile: [..., R], mean over images.
      reference: [..., R].
      size: height and width of the images.

    Returns:
      {"lsd_low": [...], "lsd_mid": [...], "lsd_high": [...]}: rings k with 0 < k < N / 6, k < N / 3, and k <= N / 2.
    """
    distance, side = np.abs(log_ratio(profile, reference)), min(size)
    third = np.minimum(6 * np.arange(1, side // 2 + 1) // side, 2)
    return {f"lsd_{name}": distance[..., third == i].mean(axis=-1) for i, name in enumerate(("low", "mid", "high"))}


def measures(means: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The measures of a set alone: high-frequency energy ratios, grid indices, variance of the Laplacian.

    The energy ratio is the sum of the power above a cutoff over the sum above 0, of the mean spectrum of the set, so
    that images of high contrast count more.

    Args:
      means: over images, [..., F] by the names of `per_image`.
    """
    total, *parts = np.moveaxis(means["energy"], -1, 0)
    found = {name: part / np.maximum(total, FLOOR) for name, part in zip(CUTOFFS, parts, strict=True)}
    for period in PERIODS:
        if f"lines_{period}" in means:
            found[f"grid_{period}"] = grid_index(means[f"lines_{period}"])
    return {**found, "laplacian": means["laplacian"]}


def crop_patches(images: np.ndarray) -> np.ndarray:
    """The centres [B, 299, 299, C] of images [B, H, W, C] of at least 299 px, at full size, for patch FID."""
    top, left = ((side - PATCH) // 2 for side in images.shape[1:3])
    return images[:, top : top + PATCH, left : left + PATCH]


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises UserError if images of height and width `size`, named `name` in the message, are below 8 px."""
    if min(size) < MIN_SIDE:
        raise UserError(
            f"{name}: images of {size[0]} x {size[1]} have no detail to measure; take some of at least {MIN_SIDE} px."
        )


def not_available(size: tuple[int, int], has_inception: bool) -> dict[str, str]:
    """The measures that images of a height and width do not allow, each with the reason."""
    text, found = f"the images are {size[0]} x {size[1]}", {}
    for period in PERIODS:
        if min(size) < 2 * period:
            found[f"grid_{period}"] = f"{text}, below two periods ({2 * period} px)"
    if min(size) < PATCH:
        found["patch_fid"] = f"{text}, below {PATCH} px"
    elif not has_inception:
        found["patch_fid"] = "it needs --inception"
    return found


def collect(parts: Iterable[dict[str, np.ndarray]], size: tuple[int, int]) -> Measured:
    """Joins what was found in the batches of a set: `per_image`, and float32 [B, 2048] "patch" where it is available.

    Raises UserError if there are fewer than 2 images.
    """
    kept, patches = [], Accumulator()
    for part in parts:
        kept.append({name: x for name, x in part.items() if name != "patch"})
        if "patch" in part:
            patches.update(part["patch"])
    rows = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
    if len(rows["profile"]) < 2:
        raise UserError("a set of 1 image is compared, but chance is estimated of at least 2.")
    return Measured(size, rows, patches.statistics() if patches.count else None)


def means(of: Measured) -> dict[str, np.ndarray]:
    """Means over the images of a set."""
    return {name: x.mean(axis=0) for name, x in of.rows.items()}


def resampled_means(of: Measured, seed: int, count: int | None = None) -> dict[str, np.ndarray]:
    """Means over `RESAMPLES` draws of images with replacement, [RESAMPLES, ...]; as many as there are, or `count`."""
    rng, size = np.random.default_rng(seed), count or of.count
    draws = (rng.integers(0, of.count, size) for _ in range(RESAMPLES))
    weights = np.stack([np.bincount(draw, minlength=of.count) for draw in draws]) / size
    return {name: np.tensordot(weights, x, axes=1) for name, x in of.rows.items()}


def _interval(value: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """[2, ...], value -/+ 1.96 standard deviations of its bootstrap resamples [RESAMPLES, ...]."""
    half = 1.96 * resampled.std(axis=0)
    return np.stack([value - half, value + half])


def compare(sets: dict[str, Measured]) -> dict[str, dict]:
    """Measures every set, and compares it with "reference" and, if there is one, "teacher".

    The intervals cover 95 % of what other images of the same kind would give: the value -/+ 1.96 standard deviations
    over 200 bootstrap resamples of images, with a fixed seed. Sets of samples with equally many images are resampled
    together, because image i of each has the noise of the same seed. Patch FID has no interval.

    A log-spectral distance of finitely many images is never 0. So those of the reference are what chance alone gives:
    the mean, and 95 % of the resamples, of the distance between two draws of its own images, one as large as the
    reference and one as large as the smallest other set.

    Args:
      sets: by name, all of one size.

    Returns:
      By name {"scores": {measure: value}, "intervals": {measure: [low, high]}, "frequency": of rings 1 ... N // 2 over
      Nyquist, "power": of these rings, "ratio_db": to the reference, "ratio_db_interval": [low, high]}. Distances to
      the teacher end in "_teacher".
    """
    reference, size = sets[REFERENCE], sets[REFERENCE].size
    whole = {name: means(one) for name, one in sets.items()}
    parts = {
        name: resampled_means(one, _REFERENCE_SEED if name == REFERENCE else _SAMPLES_SEED)
        for name, one in sets.items()
    }
    fewest = min((one.count for name, one in sets.items() if name != REFERENCE), default=reference.count)
    chance = resampled_means(reference, _CHANCE_SEED, fewest)["profile"]
    results = {}
    for name, one in sets.items():
        scores, intervals = {}, {}
        profile, profiles = whole[name]["profile"], parts[name]["profile"]
        ratios = log_ratio(chance if name == REFERENCE else profiles, parts[REFERENCE]["profile"])
        for target, suffix in ((REFERENCE, ""), (TEACHER, "_teacher")):
            if target not in sets or target == name or (target, name) == (TEACHER, REFERENCE):
                continue
            distances = log_spectral_distance(profile, whole[target]["profile"], size)
            spread = log_spectral_distance(profiles, parts[target]["profile"], size)
            scores |= {f"{key}{suffix}": float(value) for key, value in distances.items()}
            intervals |= {f"{key}{suffix}": _interval(value, spread[key]).tolist() for key, value in distances.items()}
            if one.patches and sets[target].patches:
                scores[f"patch_fid{suffix}"] = frechet_distance(sets[target].patches, one.patches)
        if name == REFERENCE:
            for key, value in log_spectral_distance(chance, parts[REFERENCE]["profile"], size).items():
                scores[key] = float(value.mean())
                intervals[key] = np.percentile(value, [2.5, 97.5]).tolist()
        own, spread = measures(whole[name]), measures(parts[name])
        scores |= {key: float(value) for key, value in own.items()}
        intervals |= {key: _interval(value, spread[key]).tolist() for key, value in own.items()}
        ratio = log_ratio(profile, whole[REFERENCE]["profile"])
        results[name] = {
            "scores": scores,
            "intervals": intervals,
            "frequency": (rings(*size).radius[1:] / (min(size) / 2)).tolist(),
            "power": profile[1:].tolist(),
            "ratio_db": ratio.tolist(),
            "ratio_db_interval": _interval(ratio, ratios).tolist(),
        }
    return results


def table(results: list[dict]) -> str:
    """A row for each measure and a column for each set, value and half its interval; below, what is not available.

    Of the distance of the reference to itself, what chance gives, the interval stands alone: it is not symmetric.
    """
    names = [f"{key}{suffix}" for suffix in ("", "_teacher") for key in UNITS]
    names = [name for name in names if any(name in result["scores"] for result in results)]
    rows = {"": [result["name"] for result in results]}
    for name in names:
        rows[f"{name} {UNITS[name.removesuffix('_teacher')]}"] = [_cell(result, name) for result in results]
    first, width = max(map(len, rows)), max(len(cell) for cells in rows.values() for cell in cells) + 2
    lines = [f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows.items()]
    lines.append("± is 95 % over images; lsd of the reference is the range that chance alone gives")
    lines += [f"{name}: not available, {why}" for name, why in results[0]["not_available"].items()]
    return "\n".join(lines)


def _cell(result: dict, name: str) -> str:
    if name not in result["scores"]:
        return "-"
    value = f"{result['scores'][name]:.5g}"
    if name not in result["intervals"]:
        return value
    low, high = result["intervals"][name]
    if result["name"] == REFERENCE and name.startswith("lsd"):
        return f"{low:.2g} to {high:.2g}"
    return f"{value} ±{float(f'{(high - low) / 2:.2g}'):g}"
