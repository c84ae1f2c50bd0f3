"""The order of examples, against the reader of codewithgpu 0.2.8."""

from collections import deque
from itertools import islice

import numpy as np
import pytest

from diffnext.data.example_order import ExampleOrder


def first(order, count, start=0):
    return list(islice(order.start_at(start), count))


class CircularBufferReader:
    """The reader as it is documented: a circular buffer of examples and a queue of ranges."""

    def __init__(self, order):
        self.order = order
        self.generator = np.random.RandomState(order.seed)
        self.shard_id = order.shard_id
        self.ranges = deque()
        self.newest_end = 0
        self.wrap()
        self.slots = [self.read() for _ in range(order.initial_fill)]

    def wrap(self):
        if not self.order.stick_to_partition:
            self.shard_id = (self.shard_id + 1) % self.order.num_shards
        size = -(-self.order.num_examples // self.order.num_shards)
        self.cursor = self.shard_id * size
        self.shard_end = min(self.cursor + size, self.order.num_examples)
        self.ranges.append([self.newest_end, self.newest_end])

    def read(self):
        index = self.cursor
        self.cursor += 1
        self.newest_end += 1
        self.ranges[-1][1] = self.newest_end
        if self.cursor == self.shard_end:
            self.wrap()
        return index

    def emit(self):
        if self.ranges[0][0] == self.ranges[0][1]:
            self.ranges.popleft()
        oldest = self.ranges[0]
        start, end = oldest
        offset = self.generator.randint(0, end - start) if self.order.shuffle else 0
        picked = (start + offset) % len(self.slots)
        index = self.slots[picked]
        self.slots[picked] = self.slots[start % len(self.slots)]
        self.slots[start % len(self.slots)] = self.read()
        oldest[0] += 1
        return index


# Emitted by the reader process of codewithgpu 0.2.8, seed 1337.
@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"num_examples": 5, "shuffle": False, "initial_fill": 1}, [0, 1, 2, 3, 4, 0, 1]),
        (
            {"num_examples": 5, "initial_fill": 4},
            [3, 2, 1, 0, 4, 3, 2, 4, 0, 1, 2, 1, 0, 4, 3],
        ),
        (
            {"num_examples": 5, "initial_fill": 1024},
            [4, 1, 3, 0, 2, 2, 3, 4, 1, 0, 0, 2, 4, 3, 1, 2, 4, 0, 1, 3],
        ),
        ({"num_examples": 7, "num_shards": 3, "shuffle": False}, [0, 1, 2, 0, 1, 2]),
        ({"num_examples": 7, "num_shards": 3, "shard_id": 1, "shuffle": False}, [3, 4, 5, 3]),
        ({"num_examples": 7, "num_shards": 3, "shard_id": 2, "shuffle": False}, [6, 6, 6]),
        (
            {"num_examples": 6, "num_shards": 3, "shuffle": False, "stick_to_partition": False},
            [2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1],
        ),
    ],
)
def test_order_is_that_of_the_reference_reader(options, indices):
    assert first(ExampleOrder(**options), len(indices)) == indices


@pytest.mark.parametrize("initial_fill", [1, 3, 13, 14, 40, 1024])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("stick_to_partition", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 0), (5, 1, 0), (40, 3, 1), (40, 3, 2), (41, 1, 0)])
def test_order_is_that_of_a_circular_buffer(initial_fill, shuffle, stick_to_partition, sizes):
    num_examples, num_shards, shard_id = sizes
    order = ExampleOrder(
        num_examples=num_examples,
        num_shards=num_shards,
        shard_id=shard_id,
        shuffle=shuffle,
        initial_fill=initial_fill,
        stick_to_partition=stick_to_partition,
        seed=7,
    )
    reader = CircularBufferReader(order)
    assert first(order, 150) == [reader.emit() for _ in range(150)]


@pytest.mark.parametrize("start", [0, 1, 12, 13, 14, 100])
@pytest.mark.parametrize("initial_fill", [4, 1024])
@pytest.mark.parametrize("stick_to_partition", [True, False])
def test_any_position_can_be_reached_directly(start, initial_fill, stick_to_partition):
    order = ExampleOrder(
        num_examples=38,
        num_shards=3,
        initial_fill=initial_fill,
        stick_to_partition=stick_to_partition,
    )
    assert first(order, 40, start) == first(order, 40 + start)[start:]


def test_each_pass_yields_every_example_of_the_shard_once():
    order = ExampleOrder(num_examples=30, num_shards=2, shard_id=1, initial_fill=6)
    indices = first(order, 60)
    for start in range(0, 60, 15):
        assert sorted(indices[start : start + 15]) == list(range(15, 30))
    assert indices[:15] != indices[15:30]


def test_a_pass_longer_than_one_draw_is_a_permutation():
    size = 70_000
    indices = first(ExampleOrder(num_examples=size, initial_fill=size), size)
    assert sorted(indices) == list(range(size))
    assert first(ExampleOrder(num_examples=size, initial_fill=size), 5, 69_998)[:2] == indices[-2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 5, "num_shards": 4, "shard_id": 3}, "fill only 3 of 4 shards"),
        ({"num_examples": 5, "num_shards": 4, "shard_id": 0}, "fill only 3 of 4 shards"),
        ({"num_examples": 2, "num_shards": 8}, "fill only 2 of 8 shards"),
        ({"num_examples": 0}, "no examples"),
        ({"num_examples": 5, "shard_id": 2, "num_shards": 2}, "shard_id must lie in"),
        ({"num_examples": 5, "shard_id": -1}, "shard_id must lie in"),
        ({"num_examples": 5, "num_shards": 0}, "shard_id must lie in"),
        ({"num_examples": 5, "initial_fill": 0}, "initial_fill must be at least 1"),
        ({"num_examples": 5, "seed": -1}, "seed must lie in"),
        ({"num_examples": 5, "seed": 2**32}, "seed must lie in"),
    ],
)
def test_an_impossible_order_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleOrder(**options)
