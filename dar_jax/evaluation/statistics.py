"""From features to numbers: moments, Frechet and kernel distance, Inception score, precision and recall.

Everything is float64 on the host but the pairwise distances of precision and recall, which take the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    Against both moments in two passes of float64 over all of 50,000 x 2048 float32 features, in batches of 250,
    the covariance is off by 3e-15 of its largest entry (a float32 sum of squares: by 5e-5).
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
        self.scatter = self.scatter + other.scatter  # a new array, because the first one may be the other's
        self.scatter += np.outer(delta * (self.count * other.count / total), delta)
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


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns KID: the unbiased squared MMD with the kernel (x . y / F + 1)^3 (Binkowski et al., 2018).

    Over all pairs of the features x [N, F] and y [M, F], where the original averages random subsets: the same
    expectation, and no dice. It may be slightly negative.

    Raises:
      UserError: there are fewer than 2 rows of either, or their F differs.
    """
    _check_pools(x, y, at_least=2)

    def kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.sum((rows @ b.T / a.shape[1] + 1) ** 3) for rows in _blocks(a, 1000))

    def within(a: np.ndarray) -> float:
        itself = np.sum((np.sum(a * a, axis=1) / a.shape[1] + 1) ** 3)
        return (kernel_sum(a, a) - itself) / (len(a) * (len(a) - 1))

    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y)))


def inception_score(logits: np.ndarray, chunk_size: int = 5000) -> float:
    """Returns exp E KL(p(y|x) || p(y)), the mean over chunks of consecutive images (Salimans et al., 2016).

    Args:
      logits: [N, classes], unshuffled and without the head's bias.
      chunk_size: images that share one p(y), as the ADM suite has it; the last chunk may be smaller.
    """
    scores = []
    for chunk in _blocks(logits, chunk_size):
        chunk = chunk.astype(np.float64)
        chunk = chunk - chunk.max(axis=1, keepdims=True)
        log_p = chunk - np.log(np.exp(chunk).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # A class whose every probability underflows has p log p = 0 and adds nothing.
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.sum(p * (log_p - log_marginal), axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, block_size: int = 5000
) -> tuple[float, float]:
    """Returns improved precision and recall (Kynkaanniemi et al., 2019).

    Precision is the fraction of samples within the ball of some reference image, whose radius is the distance to its
    k-th nearest other reference image; recall is the same with the roles exchanged.

    Args:
      reference: features [N, F].
      samples: features [M, F].
      k: which neighbour sets the radius.
      block_size: pairs are compared in blocks of at most this many rows and columns, 100 MB of distances each.

    Raises:
      UserError: there are at most k rows of either, or their F differs.
    """
    _check_pools(reference, samples, at_least=k + 1)
    # Distances do not change, and float32 keeps more of them when the features are near zero.
    centre = reference.mean(axis=0, dtype=np.float64)
    reference, samples = ((x - centre).astype(np.float32) for x in (reference, samples))

    def radii(x: np.ndarray) -> np.ndarray:  # squared, [N]
        out = []
        for rows in _blocks(x, block_size):
            nearest = np.full((len(rows), k + 1), np.inf, np.float32)  # k and itself
            for columns in _blocks(x, block_size):
                nearest = _nearest(rows, columns, nearest)
            out.append(np.asarray(nearest)[:, k])
        return np.concatenate(out)

    def covered(x: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> float:
        hits = 0
        for rows in _blocks(x, block_size):
            inside = np.zeros(len(rows), bool)
            for columns, r in zip(_blocks(centres, block_size), _blocks(radius, block_size), strict=True):
                inside |= np.asarray(_any_within(rows, columns, r))
            hits += inside.sum()
        return float(hits / len(x))

    return covered(samples, reference, radii(reference)), covered(reference, samples, radii(samples))


def _check_pools(a: np.ndarray, b: np.ndarray, at_least: int) -> None:
    _check_sizes(a[:1].ravel(), b[:1].ravel())
    if min(len(a), len(b)) < at_least:
        raise UserError(f"{len(a)} and {len(b)} images are compared, but each set needs at least {at_least}.")


def _blocks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """[N, F], [M, F] -> [N, M]."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2 * product, 0)


@jax.jit
def _nearest(rows: jax.Array, columns: jax.Array, nearest: jax.Array) -> jax.Array:
    """The smallest squared distances of each row, ascending [N, k + 1], of those before and those to the columns."""
    candidates = jnp.concatenate([nearest, _squared_distances(rows, columns)], axis=1)
    return -jax.lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _any_within(rows: jax.Array, columns: jax.Array, radius: jax.Array) -> jax.Array:
    return jnp.any(_squared_distances(rows, columns) <= radius, axis=1)
