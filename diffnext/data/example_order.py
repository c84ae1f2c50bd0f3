"""The order in which a shard of a dataset, or of several datasets, is read, for ever."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

DRAWS_AT_ONCE = 65536  # bounds the memory of one vectorised draw


@dataclass(frozen=True, kw_only=True)
class ExampleOrder:
    """An endless, reproducible sequence of example indices.

    The examples are dealt to shards of ceil(N / P) consecutive examples, so the last shard may be
    smaller, and is then passed over more often. Each pass yields every example of a shard once.
    Shuffling takes the next example from a window that slides over the pass: a draw picks one of
    the ``initial_fill`` examples in the window, and the first of them moves to the place of the
    one picked. With a window of at least a shard this is a full permutation.

    The reader of the ``codewithgpu`` package gives the same sequence, but keeps the examples of the
    window in a circular buffer. Here only indices move: an example is read when it is used, and a
    position deep in the sequence is reached by skipping whole passes.

    Attributes:
        num_examples: Size of the dataset, N.
        shard_id: The shard to read, from 0.
        num_shards: Number of shards, P.
        shuffle: Whether to shuffle.
        initial_fill: Size of the shuffling window; larger than a shard counts as a shard.
        seed: Seed of NumPy's legacy generator.
        stick_to_partition: Read the same shard in every pass, instead of the next one each time
            (the first pass then reads shard ``shard_id + 1``).

    Raises:
        ValueError: If a number is out of range, or a shard would be empty.
    """

    num_examples: int
    shard_id: int = 0
    num_shards: int = 1
    shuffle: bool = True
    initial_fill: int = 1024
    seed: int = 1337
    stick_to_partition: bool = True

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError("the dataset has no examples")
        if self.initial_fill < 1:
            raise ValueError(f"initial_fill must be at least 1, got {self.initial_fill}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"the seed must lie in [0, 2**32), got {self.seed}")
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(
                f"shard_id must lie in [0, num_shards), got {self.shard_id} of {self.num_shards}"
            )
        used_shards = filled_shards(self.num_examples, self.num_shards)
        if used_shards < self.num_shards:
            raise ValueError(
                f"{self.num_examples} examples in shards of {self.shard_size} fill only "
                f"{used_shards} of {self.num_shards} shards; the others would be empty"
            )

    @property
    def shard_size(self) -> int:
        """Examples of a shard; the last shard may have fewer."""
        return -(-self.num_examples // self.num_shards)

    @property
    def window(self) -> int:
        """Examples a draw chooses from."""
        return min(self.initial_fill, self.shard_size) if self.shuffle else 1

    def __iter__(self) -> Iterator[int]:
        return self.start_at(0)

    def start_at(self, position: int) -> Iterator[int]:
        """Yield the sequence without its first ``position`` indices."""
        generator = np.random.RandomState(self.seed)
        for number in itertools.count():
            shard = self._shard_of_pass(number)
            if position < len(shard):
                yield from itertools.islice(self._read_pass(shard, generator), position, None)
                position = 0
                continue
            position -= len(shard)
            for _ in self._draw_offsets(len(shard), generator):
                pass  # a pass that is skipped also draws

    def _shard_of_pass(self, number: int) -> range:
        shard_id = self.shard_id
        if not self.stick_to_partition:
            shard_id = (shard_id + 1 + number) % self.num_shards
        start = shard_id * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def _read_pass(self, shard: range, generator: np.random.RandomState) -> Iterator[int]:
        moved: dict[int, int] = {}  # place in the pass -> place of the example now lying there
        first = 0
        for offsets in self._draw_offsets(len(shard), generator):
            for offset in offsets.tolist():
                picked = first + offset
                yield shard[moved.pop(picked, picked)]
                if offset:
                    moved[picked] = moved.pop(first, first)
                first += 1

    def _draw_offsets(self, size: int, generator: np.random.RandomState) -> Iterator[np.ndarray]:
        """Yield the draws of one pass, in pieces: places in the window, from its first example."""
        for start in range(0, size, DRAWS_AT_ONCE):
            stop = min(start + DRAWS_AT_ONCE, size)
            if not self.shuffle:
                yield np.zeros(stop - start, dtype=np.int64)
                continue
            remaining = size - np.arange(start, stop)
            yield generator.randint(0, np.minimum(remaining, self.window))


def filled_shards(num_examples: int, num_shards: int) -> int:
    """How many of ``num_shards`` shards of ceil(N / P) consecutive examples have any."""
    shard_size = -(-num_examples // num_shards)
    return -(-num_examples // shard_size)


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """An endless, reproducible sequence of batches, each from one of several datasets.

    Batch k = 0, 1, ... of a dataset of weight w is due at (k + 1/2) / w, and batches come in the
    order in which they are due. So each dataset has its share of the batches, exactly whenever
    these shares are whole numbers, and to about a batch in between. This is not random: at any
    time, all processes of a run read from the same dataset. Inside a dataset the examples come in
    its own order.

    Attributes:
        orders: Order of the examples of each dataset.
        weights: In which proportion batches come from the datasets.
        batch_size: Examples in a batch.
    """

    orders: tuple[ExampleOrder, ...]
    weights: tuple[int, ...]
    batch_size: int

    def start_at(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the batches after the first ``position`` examples.

        Each is the number of its dataset, and the places of its examples there. A position inside
        a batch counts for the dataset of that batch.
        """
        number, rest = divmod(position, self.batch_size)
        batches = self._batches_before(number)
        starts = [count * self.batch_size for count in batches]
        starts[self._next_dataset(batches)] += rest
        indices = [order.start_at(start) for order, start in zip(self.orders, starts, strict=True)]
        while True:
            dataset = self._next_dataset(batches)
            batches[dataset] += 1
            yield dataset, list(itertools.islice(indices[dataset], self.batch_size))

    def _batches_before(self, number: int) -> list[int]:
        """Batches of each dataset among the first ``number``."""
        total = sum(self.weights)
        # All batches that are due by then are among them; the few others are counted one by one.
        time = max(number - len(self.weights), 0)
        batches = [(2 * weight * time + total) // (2 * total) for weight in self.weights]
        for _ in range(number - sum(batches)):
            batches[self._next_dataset(batches)] += 1
        return batches

    def _next_dataset(self, batches: Sequence[int]) -> int:
        """The dataset whose next batch is due first, after these numbers of batches."""
        scale = lcm(*self.weights)
        due = [
            (2 * count + 1) * (scale // weight)
            for count, weight in zip(batches, self.weights, strict=True)
        ]
        return due.index(min(due))
