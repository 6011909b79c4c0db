"""Moments and distances against closed forms, sqrtm, singular values of the data, np.cov and loops over images."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from dar_jax.errors import UserError
from dar_jax.evaluation.statistics import (
    Accumulator,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def accumulate(features, *splits):
    accumulator = Accumulator()
    for batch in np.split(features, splits):
        accumulator.update(batch)
    return accumulator


def random_gaussian(rng, size):
    factor = rng.normal(size=(size, size)) / np.sqrt(size)
    return Statistics(1000, rng.normal(size=size), factor @ factor.T + 0.01 * np.eye(size))


@pytest.mark.parametrize("size", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_unit_gaussians_one_apart_in_each_feature(size):
    unit = np.eye(size)
    distance = frechet_distance(Statistics(10, np.zeros(size), unit), Statistics(10, np.ones(size), unit))
    np.testing.assert_allclose(distance, size, rtol=1e-12)


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    a, b, shift = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20), rng.normal(size=20)
    distance = frechet_distance(
        Statistics(10, shift, rotation * a @ rotation.T),
        Statistics(10, np.zeros(20), rotation * b @ rotation.T),
    )
    expected = np.sum(shift**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_general_covariances_against_sqrtm_both_ways_round(size):
    rng = np.random.default_rng(size)
    a, b = random_gaussian(rng, size), random_gaussian(rng, size)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-9)
    assert 0 <= frechet_distance(a, a) < 1e-12 * np.trace(a.covariance)


@pytest.mark.parametrize(
    ("count", "size", "decay"),
    [pytest.param(500, 2048, 0, marks=pytest.mark.slow), (200, 512, 0), (100, 128, 2), (300, 128, 4)],
)
def test_rank_deficient_and_badly_conditioned_covariances(count, size, decay):
    """tr sqrt(S_a S_b) is the nuclear norm of A B^T / (n - 1) of the centred data: no covariance, no root."""
    rng = np.random.default_rng(0)
    spread = np.arange(1.0, size + 1) ** -decay
    x, y = rng.normal(size=(count, size)) * spread, (0.1 + rng.normal(size=(count, size))) * spread
    a, b = accumulate(x).statistics(), accumulate(y).statistics()
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    overlap = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum() / (count - 1)
    traces = (np.sum(centred_x**2) + np.sum(centred_y**2)) / (count - 1)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + traces - 2 * overlap
    distance = frechet_distance(a, b)
    assert np.isfinite(distance)
    np.testing.assert_allclose(distance, expected, rtol=1e-9)
    assert 0 <= frechet_distance(a, a) < 1e-10 * traces


def test_a_line_against_a_ball_has_a_closed_form():
    """Covariances r^2 u u^T and I: the root has trace r; rounding in other directions must not add to it."""
    direction = np.random.default_rng(0).normal(size=128)
    direction *= 1000 / np.linalg.norm(direction)
    line, ball = np.outer(direction, direction), np.eye(128)
    distance = frechet_distance(Statistics(10, np.zeros(128), line), Statistics(10, np.zeros(128), ball))
    np.testing.assert_allclose(distance, 1000**2 + 128 - 2 * 1000, rtol=1e-12)


def test_constant_features_have_the_distance_of_their_means():
    a, b = accumulate(np.zeros((5, 4))).statistics(), accumulate(np.full((5, 4), 3.0)).statistics()
    assert frechet_distance(a, b) == 36.0


def test_streaming_far_from_zero_equals_numpy():
    features = (1e6 + np.random.default_rng(0).normal(size=(1001, 8)) * np.arange(1, 9)).astype(np.float32)
    got = accumulate(features, 1, 100, 600).statistics()
    exact = features.astype(np.float64)
    assert got.count == 1001
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_allclose(got.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


def test_merging_in_any_order_gives_the_same_and_leaves_the_others_alone():
    features = 1e3 + np.random.default_rng(1).normal(size=(60, 5))
    parts = [accumulate(part) for part in np.split(features, [7, 30])] + [Accumulator()]
    for order in itertools.permutations(parts):
        total = Accumulator()
        for part in order:
            total.merge(part)
        got = total.statistics()
        assert got.count == 60
        np.testing.assert_allclose(got.mean, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(got.covariance, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-11)
    assert [part.count for part in parts] == [7, 23, 30, 0]


def test_mistakes_are_told():
    accumulator = accumulate(np.ones((1, 4)))
    with pytest.raises(UserError, match="at least 2 samples, not 1"):
        accumulator.statistics()
    with pytest.raises(UserError, match="4 and 5 features"):
        accumulator.update(np.ones((2, 5)))
    with pytest.raises(UserError, match="2 of 3 images are not finite"):
        accumulator.update(np.array([[0, 0, 0, np.nan], [0, 0, 0, 0], [np.inf, 0, 0, 0]]))
    assert accumulator.count == 1
    a, b = random_gaussian(np.random.default_rng(0), 4), random_gaussian(np.random.default_rng(0), 1)
    with pytest.raises(UserError, match="4 and 1 features"):
        frechet_distance(a, b)
    with pytest.raises(UserError, match="NaN or infinite"):
        frechet_distance(a, a._replace(covariance=a.covariance * np.nan))


def features_of(seed, count, size=16, shift=0.0):
    """Skewed features far from zero, as those of a ReLU network are."""
    mix = np.random.default_rng(99).uniform(0, 1, (size, size))
    return (np.random.default_rng(seed).gamma(2, 1, (count, size)) @ mix + shift).astype(np.float32)


def distances(a, b):
    """float64 [N, M], without expanding the square."""
    return np.stack([np.sqrt(np.sum((row - b.astype(np.float64)) ** 2, axis=1)) for row in a.astype(np.float64)])


@pytest.mark.parametrize("size", [16, 2048])
def test_kernel_distance_against_all_pairs(size):
    x, y = features_of(0, 60, size) / size, features_of(1, 45, size, 0.5) / size
    terms = []
    for a, b in ((x, x), (y, y), (x, y)):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (a is b and i == j)]
        terms.append(np.mean([(np.dot(*np.float64([a[i], b[j]])) / size + 1) ** 3 for i, j in pairs]))
    np.testing.assert_allclose(kernel_distance(x, y), terms[0] + terms[1] - 2 * terms[2], rtol=1e-5)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    values = [kernel_distance(features_of(i, 40), features_of(i, 80)[40:]) for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0 < max(values)


def test_kernel_distance_in_blocks():
    x, y = features_of(0, 2300), features_of(1, 1100)
    kernel = lambda a, b: (a.astype(np.float64) @ b.T.astype(np.float64) / 16 + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
    np.testing.assert_allclose(kernel_distance(x, y), off(xx) + off(yy) - 2 * xy.mean(), rtol=1e-7)


def test_inception_score_against_entropies():
    """exp(H(y) - H(y|x)) of each chunk, entropies by scipy; a logit of -200 gives no NaN."""
    logits = np.random.default_rng(0).normal(size=(250, 12)).astype(np.float32) * 3
    logits[:, 3] -= 200
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    scores = []
    for chunk in (p[:100], p[100:200], p[200:]):
        scores.append(np.exp(scipy.stats.entropy(chunk.mean(0)) - scipy.stats.entropy(chunk, axis=1).mean()))
    np.testing.assert_allclose(inception_score(logits, 100), np.mean(scores), rtol=1e-10)
    np.testing.assert_allclose(inception_score(10 * np.eye(7)[np.arange(70) % 7] * 100), 7, rtol=1e-10)
    np.testing.assert_allclose(inception_score(np.tile(logits[:1], (30, 1))), 1, rtol=1e-10)


def test_inception_score_takes_5000_at_a_time():
    """Two chunks, of one class each, score 1; together they would score 2."""
    logits = np.zeros((10_000, 2), np.float32)
    logits[:5000, 0] = logits[5000:, 1] = 100
    np.testing.assert_allclose(inception_score(logits), 1, rtol=1e-10)


@pytest.mark.parametrize("block_size", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_sorted_distances(k, block_size):
    reference, samples = features_of(0, 130, 6), features_of(1, 90, 6, shift=1) * 0.8
    radius = {name: np.sort(distances(x, x), axis=1)[:, k] for name, x in {"r": reference, "s": samples}.items()}
    between = distances(samples, reference)
    precision = np.mean((radius["r"] >= between).any(axis=1))
    recall = np.mean((radius["s"] >= between.T).any(axis=1))
    assert 0.1 < precision < 1 and 0.1 < recall < 1 and precision != recall
    assert precision_recall(reference, samples, k, block_size) == pytest.approx((precision, recall), abs=1e-12)


def test_precision_and_recall_of_special_sets():
    reference = features_of(0, 60)
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference, reference + 1000) == (0, 0)
    collapsed = np.repeat(reference[:1], 60, axis=0)  # good samples of one image
    precision, recall = precision_recall(reference, collapsed)
    assert precision == 1 and recall <= 5 / 60
    assert precision_recall(reference + 1e4, features_of(1, 60) + 1e4) == precision_recall(
        reference, features_of(1, 60)
    )


def test_sets_that_are_too_small_or_of_another_network():
    x = features_of(0, 10)
    with pytest.raises(UserError, match="3 and 10 images are compared, but each set needs at least 4"):
        precision_recall(x[:3], x)
    with pytest.raises(UserError, match="1 images are compared, but each set needs at least 2"):
        kernel_distance(x, x[:1])
    for compare in (kernel_distance, precision_recall):
        with pytest.raises(UserError, match="16 and 8 features"):
            compare(x, x[:, :8])
