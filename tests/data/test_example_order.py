"""The order of examples, against the reader of codewithgpu 0.2.8."""

from collections import deque
from itertools import islice

import numpy as np
import pytest

from diffnext.data.example_order import BatchOrder, ExampleOrder, filled_shards


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


# Several datasets


def batch_order(weights, sizes=None, batch_size=2, **options):
    sizes = sizes or [7 + 3 * number for number in range(len(weights))]
    orders = tuple(ExampleOrder(num_examples=size, **options) for size in sizes)
    return BatchOrder(orders=orders, weights=weights, batch_size=batch_size)


def datasets_of(order, count, start=0):
    """Which dataset each of some batches comes from."""
    batches = islice(order.start_at(start * order.batch_size), count)
    return [dataset for dataset, _ in batches]


WEIGHTS = [(2, 1, 1), (1,), (1, 1), (5, 3), (1, 1000), (7, 1, 1, 1, 2), (131_071, 65_537, 9)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_dataset_has_its_share_of_any_stretch(weights):
    chosen = datasets_of(batch_order(weights), 1200)
    total = sum(weights)
    for number, weight in enumerate(weights):
        taken = np.cumsum(np.array(chosen) == number)
        expected = np.arange(1, 1201) * weight / total
        assert np.abs(taken - expected).max() < 1.1
        if 1200 % total == 0:
            assert taken[-1] == 1200 * weight // total


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 1, 2, 3, 10, 97, 12_345])
def test_any_batch_can_be_reached_directly(weights, start):
    order = batch_order(weights, batch_size=3, initial_fill=4)
    following = list(islice(order.start_at(3 * start), 40))
    before = max(start - 50, 0)
    assert following == list(islice(order.start_at(3 * before), start - before + 40))[-40:]


def test_batches_of_one_dataset_are_its_order_in_pieces():
    order = batch_order((5,), [11], batch_size=4, initial_fill=3)
    for start in (0, 3, 4, 30, 45):
        batches = islice(order.start_at(start), 6)
        assert [index for _, batch in batches for index in batch] == first(
            order.orders[0], 24, start
        )


def test_examples_of_each_dataset_come_in_its_own_order():
    order = batch_order((2, 1, 1), [5, 9, 4], batch_size=2)
    batches = list(islice(order.start_at(0), 40))
    for number in range(3):
        own = [index for dataset, batch in batches if dataset == number for index in batch]
        assert own == first(order.orders[number], len(own))


@pytest.mark.parametrize(
    ("num_examples", "num_shards", "expected"), [(8, 4, 4), (5, 4, 3), (3, 8, 3), (1, 1, 1)]
)
def test_shards_that_are_filled_can_all_be_read(num_examples, num_shards, expected):
    filled = filled_shards(num_examples, num_shards)
    assert filled == expected
    found = [
        index
        for shard_id in range(filled)
        for index in set(
            first(ExampleOrder(num_examples=num_examples, num_shards=filled, shard_id=shard_id), 20)
        )
    ]
    assert sorted(found) == list(range(num_examples))
