"""Mean and covariance of features, streamed in float64, and the Frechet distance of two Gaussians."""

from typing import NamedTuple

import numpy as np

from dar_jax.errors import UserError


class Statistics(NamedTuple):
    """Of `count` samples: mean float64 [F] and covariance float64 [F, F] with normaliser count - 1."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


class Accumulator:
    """Sums up batches of features on the host, one after the other or merged from several accumulators.

    Keeps the mean and the scatter sum (x - mean)(x - mean)^T and joins two sets by the pairwise update of
    Chan, Golub and LeVeque (1979): unlike a sum of squares it stays precise when the mean is far from zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(())  # [F] from the first batch on
        self.scatter = np.zeros(())  # [F, F]

    def update(self, features: np.ndarray) -> None:
        """Adds features [B, F], B >= 1, of any float type.

        Raises:
          UserError: a feature is NaN or infinite, or F differs from the batches before.
        """
        batch = Accumulator()
        features = np.asarray(features, np.float64)
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise UserError(
                f"features of {np.sum(~finite)} of {len(features)} images are not finite: "
                "look for NaN in the samples or in the feature network's weights."
            )
        batch.count = len(features)
        batch.mean = features.mean(axis=0)
        centred = features - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: "Accumulator") -> None:
        """Adds all samples of another accumulator, which is left as it is.

        Raises:
          UserError: both hold samples and their numbers of features differ.
        """
        if not other.count:
            return
        if self.count:
            _check_sizes(self.mean, other.mean)
        total = self.count + other.count
        delta = other.mean - self.mean  # [F]
        self.scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Returns mean and covariance of all samples so far.

        Raises:
          UserError: there are fewer than 2 samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.count}; raise config.eval.num_samples.")
        return Statistics(self.count, self.mean, self.scatter / (self.count - 1))


def _check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"sets of {a.size} and {b.size} features cannot be joined or compared: use one feature network."
        )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Frechet distance of two Gaussians (Heusel et al., 2017), finite and >= 0.

    |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 sum_i sqrt(eig_i(S_a^(1/2) S_b S_a^(1/2))), in float64. The
    square roots of these eigenvalues are the singular values of S_a^(1/2) S_b^(1/2) and computed as such:
    roots of computed eigenvalues have half the digits where those are small or, without full rank, zero.

    Raises:
      UserError: the numbers of features differ, or a mean or covariance is not finite.
    """
    _check_sizes(a.mean, b.mean)
    for array in (a.mean, a.covariance, b.mean, b.covariance):
        if not np.isfinite(array).all():
            raise UserError("statistics with NaN or infinite entries have no Frechet distance: compute them again.")
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(distance), 0.0)  # equal sets may come out a rounding error below zero


def _root(covariance: np.ndarray) -> np.ndarray:
    """Returns R [F, rank] with R R^T = covariance [F, F], the symmetric square root up to a rotation."""
    values, vectors = np.linalg.eigh(covariance)
    # Below this an eigenvalue is rounding of zero, of either sign, and its root would not be small.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
