"""The order of examples in batches of one group, against a simulation that reads the stream one by one."""

import pickle

import numpy as np
import pytest

from dar_jax.data.order import Order


def simulate(seed, batch_size, groups, count):
    """The first `count` batches, by queues."""
    batches, queues, epoch = [], {group: [] for group in groups}, 0
    while len(batches) < count:
        for example in np.random.default_rng((seed, epoch)).permutation(len(groups)):
            queue = queues[groups[example]]
            queue.append(example)
            if len(queue) == batch_size:
                batches.append((groups[example], queue.copy()))
                queue.clear()
        epoch += 1
    return batches[:count]


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [([50], 16), ([3], 8), ([40, 25, 7], 6), ([30, 1, 2], 8), ([0, 9, 4], 5), ([2, 1], 16)]
)
def test_batches_are_those_of_queues(sizes, batch_size):
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order, steps = Order(3, batch_size, groups), 60
    expected = simulate(3, batch_size, groups, steps)
    for step in np.random.default_rng(0).permutation(steps):  # in any order
        group, indices = order.batch(int(step))
        assert (group, indices.tolist()) == (expected[step][0], [int(i) for i in expected[step][1]])
    group, indices = pickle.loads(pickle.dumps(order)).batch(steps - 1)
    assert indices.tolist() == [int(i) for i in expected[-1][1]]


def test_no_example_is_left_out_and_groups_come_by_their_sizes():
    sizes = np.array([600, 300, 99, 1])
    groups = np.repeat(np.arange(4), sizes)
    batches = [Order(0, 10, groups).batch(step) for step in range(1000)]  # ten epochs
    seen = np.bincount(np.concatenate([indices for _, indices in batches]), minlength=1000)
    assert seen.min() >= 9 and seen.max() <= 10
    assert np.bincount([group for group, _ in batches]).tolist() == [600, 300, 99, 1]
    first = [group for group, _ in batches[:50]]
    assert 20 < first.count(0) < 40 and len(set(first)) >= 3  # mixed, not one group after the other
