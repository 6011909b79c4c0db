"""Sets of images in the ADM layout: an npz of arr_0 (uint8 images) and, of a reference, mu, sigma, mu_s, sigma_s."""

import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dar_jax import files
from dar_jax.errors import UserError, near_miss
from dar_jax.evaluation.statistics import Statistics

# Features -> the keys of their mean and covariance.
MOMENT_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ImageSet(NamedTuple):
    """`shape` is [N, H, W, C], C = 1 or 3, of the images of `path`; they are read only when iterated over."""

    path: str
    shape: tuple[int, ...]

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """Yields the first `limit` images, uint8 [b, H, W, C].

        Raises UserError if the array is damaged, at the latest after the last of them; its checksum is of all images.
        """
        count = self.shape[0] if limit is None else min(limit, self.shape[0])
        size = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(files.local(self.path)) as archive, archive.open("arr_0.npy") as file:
                _read_header(file)
                for start in range(0, count, batch_size):
                    number = min(batch_size, count - start)
                    yield np.frombuffer(file.read(number * size), np.uint8).reshape(number, *self.shape[1:])
                while file.read(1 << 24):
                    pass
        except Exception as error:  # a damaged file fails in many ways, and the cure is the same for all
            raise UserError(f'"{self.path}" is damaged ({error}); fetch or write it again.') from error


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of the .npy that starts here."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def array_names(path: str, flag: str) -> set[str]:
    """Names of the arrays of an npz. Raises UserError if there is no such file, or it is damaged."""
    if not files.local(path).is_file():
        raise UserError(f'{flag} = "{path}" is no file; name an .npz in the ADM layout.')
    try:
        with zipfile.ZipFile(files.local(path)) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # as in `ImageSet.batches`
        raise UserError(f'{flag} = "{path}" is no whole .npz ({error}); fetch or write it again.') from error


def open_images(path: str, flag: str) -> ImageSet:
    """Opens the images of an npz and checks all that its header tells.

    Args:
      path: the npz, compressed or not.
      flag: what to call it in an error.

    Raises:
      UserError: the file is missing or damaged, has no arr_0, or arr_0 is not uint8 [N >= 1, H, W, 1 or 3].
    """
    keys = array_names(path, flag)
    if "arr_0" not in keys:
        raise UserError(f'{flag} = "{path}" has no images "arr_0".{near_miss("arr_0", keys)}')
    try:
        with zipfile.ZipFile(files.local(path)) as archive, archive.open("arr_0.npy") as file:
            shape, fortran_order, dtype = _read_header(file)
    except Exception as error:  # as in `ImageSet.batches`
        raise UserError(f'{flag} = "{path}" is damaged ({error}); fetch or write it again.') from error
    if dtype != np.uint8:
        raise UserError(
            f'{flag} = "{path}": arr_0 is {dtype}, but images are uint8 from 0 to 255; convert them, '
            "clip(127.5 x + 128) for images in [-1, 1]."
        )
    if len(shape) != 4 or min(shape) < 1 or shape[3] not in (1, 3):
        raise UserError(f'{flag} = "{path}": arr_0 has shape {list(shape)}, but images are [N, H, W, 1 or 3].')
    if fortran_order:
        raise UserError(f'{flag} = "{path}": arr_0 is in Fortran order; save np.ascontiguousarray(arr_0).')
    return ImageSet(path, shape)


def read_names(path: str, flag: str) -> np.ndarray | None:
    """The labels or captions of an npz of samples, arr_1, [N]; None if it has no such array.

    Raises UserError if the file is missing or damaged.
    """
    if "arr_1" not in array_names(path, flag):
        return None
    try:
        with np.load(files.local(path)) as file:
            names = file["arr_1"]
    except Exception as error:  # as in `ImageSet.batches`
        raise UserError(f'{flag} = "{path}" is damaged ({error}); fetch or write it again.') from error
    return names if names.ndim == 1 else None


def read_moments(path: str, flag: str) -> dict[str, Statistics]:
    """Means and covariances of an npz, float64, by features ("pool", "spatial"); {} if it has none.

    Their `count` is that of arr_0, 0 if there is none.

    Raises:
      UserError: the file is missing or damaged, one of mean and covariance is missing, or their shapes differ from
        [F] and [F, F], or they are not finite.
    """
    keys, moments = array_names(path, flag), {}
    count = open_images(path, flag).shape[0] if "arr_0" in keys else 0
    for name, (mean_key, covariance_key) in MOMENT_KEYS.items():
        present = {mean_key, covariance_key} & keys
        if len(present) == 1:
            (missing,) = {mean_key, covariance_key} - present
            raise UserError(f'{flag} = "{path}" has "{present.pop()}" but no "{missing}"; write both or neither.')
        if not present:
            continue
        try:
            with np.load(files.local(path)) as file:
                mean, covariance = (np.asarray(file[key], np.float64) for key in (mean_key, covariance_key))
        except Exception as error:  # a damaged array fails in many ways, and the cure is the same for all
            raise UserError(f'{flag} = "{path}" is damaged ({error}); fetch or write it again.') from error
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise UserError(
                f'{flag} = "{path}": "{mean_key}" has shape {list(mean.shape)} and "{covariance_key}" '
                f"{list(covariance.shape)}, but they must be [F] and [F, F]."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f'{flag} = "{path}": "{mean_key}" or "{covariance_key}" has NaN or infinite entries.')
        moments[name] = Statistics(count, mean, covariance)
    return moments


def write_set(
    path: str, shape: tuple[int, ...], images: Iterable[np.ndarray], others: dict[str, np.ndarray], flag: str
) -> None:
    """Writes an npz without ever holding its images: arr_0, uint8 of `shape`, from batches, and other arrays.

    The file appears whole or not at all. Raises UserError if it cannot be written.
    """
    with files.writing(path, flag), files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in images:
                file.write(np.ascontiguousarray(batch).tobytes())
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array)
