"""Batches of samples; the samples themselves are tested in integration/test_evaluate.py and test_run.py."""

import jax
import numpy as np

from dar_jax.evaluation.sampling import sample_images
from tests.training import tiny


def test_batches_are_rounded_up_to_what_the_devices_share():
    """Six on four devices: eight are drawn at a time, and what fills up the last batch is dropped."""
    drawn = []

    @jax.jit
    def draw(params, index, condition):
        jax.debug.callback(lambda n: drawn.append(int(n)), len(index))
        return (index + 100 * condition["label"])[:, None, None, None].astype(np.float32)

    labels = np.arange(10) % 2
    batches = list(sample_images(draw, {}, {"label": labels}, 6, tiny.make_mesh(4, 1), first=1, as_uint8=False))
    assert [len(batch) for batch in batches] == [8, 1]
    np.testing.assert_array_equal(np.concatenate(batches).ravel(), np.arange(1, 10) + 100 * labels[1:])
    assert drawn == [8, 8]
