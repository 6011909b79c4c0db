"""Which examples make which batch: a pure function of the seed and the step."""

import functools
from typing import NamedTuple

import numpy as np


class Order:
    """The endless order of the examples, in batches of one group each.

    The stream of examples is a new permutation of all of them for every epoch. Each example waits for its group, and a
    group makes a batch when `batch_size` of its examples have come. What is left at the end of an epoch waits on, and
    the examples of the next epoch join it. So no example is left out, each comes once before any of its group comes
    again, and a group with fewer examples than a batch has repeats them in it. Batches of a single group are the
    stream, cut.

    Args:
      seed: of the permutations, 0 <= seed.
      batch_size: examples of a batch.
      groups: the group of each example, int [N], from 0 on.
    """

    def __init__(self, seed: int, batch_size: int, groups: np.ndarray):
        self.seed, self.batch_size, self.groups = seed, batch_size, groups
        self.sizes = np.bincount(groups)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """The group of the batch of a step, and its examples, int [batch_size]."""
        return _batch(self, step)

    def _batches_before(self, epoch: int) -> int:
        return int((epoch * self.sizes // self.batch_size).sum())

    def _find(self, step: int) -> tuple[int, int]:
        """The group of the batch of a step, and how many batches of the group came before."""
        if len(self.sizes) == 1:
            return 0, step
        epoch = step * self.batch_size // len(self.groups)  # batches wait, so that it is no earlier one
        while self._batches_before(epoch + 1) <= step:
            epoch += 1
        found = _epoch(self, epoch)
        index = step - self._batches_before(epoch)
        return int(found.batch_groups[index]), int(found.batch_numbers[index])


class _Epoch(NamedTuple):
    members: np.ndarray  # all examples, group by group, each in the order of the stream
    starts: np.ndarray  # where each group starts in them
    batch_groups: np.ndarray  # of the batches that the epoch completes
    batch_numbers: np.ndarray  # among the batches of the group


@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> _Epoch:
    # Grain's own shuffle searches a space of 2^16 for each index: 60 us on the digits, 7 ms on ten images.
    stream = np.random.default_rng((order.seed, epoch)).permutation(len(order.groups))
    starts = np.cumsum(order.sizes) - order.sizes
    if len(order.sizes) == 1:
        return _Epoch(stream, starts, np.zeros(0, int), np.zeros(0, int))
    groups = order.groups[stream]
    by_group = np.argsort(groups, kind="stable")
    rank = np.empty(len(stream), int)  # of an example of the stream in its group
    rank[by_group] = np.arange(len(stream)) - np.repeat(starts, order.sizes)
    count = epoch * order.sizes[groups] + rank + 1  # examples of the group so far, over all epochs
    last = count % order.batch_size == 0
    return _Epoch(stream[by_group], starts, groups[last], count[last] // order.batch_size - 1)


@functools.lru_cache(maxsize=64)  # several threads read rows of neighbouring batches
def _batch(order: Order, step: int) -> tuple[int, np.ndarray]:
    group, number = order._find(step)
    places = number * order.batch_size + np.arange(order.batch_size)
    epochs, ranks = np.divmod(places, order.sizes[group])
    indices = np.empty(order.batch_size, int)
    for epoch in range(epochs[0], epochs[-1] + 1):
        found, chosen = _epoch(order, epoch), epochs == epoch
        indices[chosen] = found.members[found.starts[group] + ranks[chosen]]
    return group, indices
