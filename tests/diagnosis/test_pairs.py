"""The noise of a pair is normal, its own, and no other in another batch."""

import jax
import numpy as np

from dar_jax.diagnosis.pairs import noise


def test_noise_follows_from_seed_and_index():
    first = np.asarray(noise(0, np.arange(40), (8, 8, 1)))
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    likeness = np.corrcoef(first.reshape(40, -1)) - np.eye(40)
    assert np.abs(likeness).max() < 0.6  # 64 numbers each: equal ones would give 1
    np.testing.assert_array_equal(noise(0, np.array([17, 3]), (8, 8, 1)), first[[17, 3]])
    assert not np.isclose(jax.device_get(noise(1, np.arange(40), (8, 8, 1))), first).all(axis=(1, 2, 3)).any()
