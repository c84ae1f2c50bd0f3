"""Endless, reproducible and resumable loaders of training batches."""

import atexit
import difflib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils.data

from diffnext.data.dataset_folders import Folders, batch_weights, list_folders
from diffnext.data.example_order import BatchOrder, ExampleOrder, filled_shards
from diffnext.data.flex_pipelines import FeatureWorker, Worker
from diffnext.data.flex_transforms import check_features
from diffnext.data.records import RecordDataset, RecordError

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Any]
# Number of a dataset, position of the first example in the stream, places in the dataset.
Samples: TypeAlias = tuple[int, int, list[int]]

EXAMPLE_BYTES = 1024  # of Python objects around the data of an example
MINIMA = {"seed": 0, "shard_id": 0, "num_workers": 0} | dict.fromkeys(
    ("num_shards", "batch_size", "queue_depth", "initial_fill"), 1
)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Keyword arguments of the loaders.

    Attributes:
        seed: Seed of the order and of the caption choice; ``shard_id`` is added to it.
        shuffle: Whether to shuffle.
        shard_id: The shard to read, from 0.
        num_shards: Number of shards, usually one per training process.
        batch_size: Examples in a batch.
        num_workers: Processes that read and transform, at most one per available CPU; 0 reads in
            ``next()``. Batches are the same for any number.
        queue_depth: Batches each process prepares ahead.
        contiguous: Stack the latents into one array; otherwise leave a list of arrays.
        initial_fill: Size of the shuffling window, in examples of one dataset.
        stick_to_partition: Read the same shard in every pass, instead of the next one.
        dataset_getter: Opens a dataset, called as ``dataset_getter(path=path)``;
            ``RecordDataset`` by default. The result needs ``len()`` and ``[index]``, and must be
            picklable if processes are spawned.
        max_examples: The number of examples, which is checked if it is given.
        prefetch_count: Accepted and ignored: a large buffer before the first batch gains nothing.
        start_method: How to start the processes. By default ``fork``, which starts in milliseconds
            and does not run the training script again.
        timeout: Seconds to wait for a batch of a process; 0 waits for ever.

    Raises:
        TypeError: If a number is not a whole number.
        ValueError: If a value is out of range.
    """

    seed: int = 1337
    shuffle: bool = True
    shard_id: int = 0
    num_shards: int = 1
    batch_size: int = 1
    num_workers: int = 0
    queue_depth: int = 2
    contiguous: bool = True
    initial_fill: int = 1024
    stick_to_partition: bool = True
    dataset_getter: Callable[..., Any] | None = None
    max_examples: int | None = None
    prefetch_count: int = 50
    start_method: str | None = None
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, minimum in MINIMA.items():
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not isinstance(self.timeout, Real) or not self.timeout >= 0:
            raise ValueError(f"timeout must be a number of at least 0, got {self.timeout!r}")
        start_methods = multiprocessing.get_all_start_methods()
        if self.start_method not in (None, *start_methods):
            raise ValueError(
                f"start_method must be one of {start_methods}, got {self.start_method!r}"
            )

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "LoaderOptions":
        """Check the names of keyword arguments, then their values.

        Raises:
            TypeError: If there is no such argument.
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(known)}"
                raise TypeError(f"unknown loader argument {name!r}; {hint}")
        return cls(**keywords)

    def make_orders(self, counts: Sequence[int]) -> tuple[ExampleOrder, ...]:
        """The orders of the examples of datasets.

        Among several datasets, one with too few examples has fewer shards, each for several
        processes.

        Args:
            counts: Examples of each dataset.

        Raises:
            ValueError: If the shard of a single dataset would be empty.
        """
        orders = []
        for count in counts:
            shard_id, num_shards = self.shard_id, self.num_shards
            if len(counts) > 1 and filled_shards(count, num_shards) < num_shards:
                num_shards = filled_shards(count, num_shards)
                shard_id %= num_shards
            order = ExampleOrder(
                num_examples=count,
                shard_id=shard_id,
                num_shards=num_shards,
                shuffle=self.shuffle,
                initial_fill=self.initial_fill,
                seed=self.seed + self.shard_id,
                stick_to_partition=self.stick_to_partition,
            )
            orders.append(order)
        return tuple(orders)


class DataLoaderBase(ABC):
    """An endless iterator over batches that can be closed."""

    @abstractmethod
    def next(self) -> list[Batch]:
        """Return the next batch, in a list with one element."""

    @abstractmethod
    def close(self) -> None:
        """Stop the processes and release the files."""

    def __next__(self) -> list[Batch]:
        return self.next()

    def __call__(self) -> list[Batch]:
        """Return the next batch, in a list with one element."""
        return self.next()

    def __iter__(self) -> "DataLoaderBase":
        return self

    def __enter__(self) -> "DataLoaderBase":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class DataLoader(DataLoaderBase):
    """Batches of a record dataset, or of several.

    Position n of the stream of examples has the same example and the same random choices for any
    number of processes, so only the number of consumed examples has to be saved. A batch that
    fails does not count: the next call tries it again.

    Each batch is from one dataset, and at any time all shards read from the same one; see
    :class:`~diffnext.data.example_order.BatchOrder`.

    Args:
        dataset: Dataset folder, or several; see :mod:`diffnext.data.dataset_folders`. A dataset
            among several that has too few examples for all shards has fewer shards.
        worker: Class of the example pipeline.
        **kwargs: See ``LoaderOptions``.

    Attributes:
        datasets: The open datasets, in the order of the folders.

    Raises:
        FileNotFoundError: If there is no dataset.
        TypeError: If an argument is unknown, or has the wrong type.
        ValueError: If an argument is out of range, a dataset is malformed or does not have
            ``max_examples`` examples, a shard would be empty, or a batch would not fit in memory.
    """

    def __init__(self, dataset: Folders, worker: Callable[[], Worker], **kwargs: Any) -> None:
        self.options = LoaderOptions.from_keywords(kwargs)
        folders = list_folders(dataset)
        self._paths = [folder.path for folder in folders]
        open_dataset = self.options.dataset_getter or RecordDataset
        self.datasets = [open_dataset(path=path) for path in self._paths]
        for part in self.datasets:
            if isinstance(part, RecordDataset):
                part.share_open_files(len(self.datasets))
        counts = [len(dataset) for dataset in self.datasets]
        self._order = BatchOrder(
            orders=self.options.make_orders(counts),
            weights=batch_weights(folders, counts),
            batch_size=self.options.batch_size,
        )
        self._worker = worker()
        self._worker.seed = self._order.orders[0].seed
        self._consumed = 0
        self._batches: Iterator[Batch] | None = None
        self._closed = False
        self._check_size()
        self._check_memory()
        self._log_order()

    def next(self) -> list[Batch]:
        """Return the next batch, in a list with one element.

        Returns:
            One dict with ``latents``, (B, ...) or a list of B arrays, and a list of B values for
            each other output of the pipeline.

        Raises:
            RecordError: If an example is corrupt or malformed; it names file and example.
            RuntimeError: If a process died or took too long, or the loader is closed.
        """
        if self._closed:
            raise RuntimeError(f"cannot read {self._name}: the loader is closed")
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except Exception as error:
            self._batches = None
            if isinstance(error, RuntimeError):
                place = f"position {self._consumed} of the stream"
                raise RuntimeError(f"{self._name}: no batch at {place}: {error}") from error
            if isinstance(error, RecordError):
                raise RecordError(_own_message(error)) from error
            raise
        self._consumed += self.options.batch_size
        return [batch]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the options that the stream depends on.

        Returns:
            Plain numbers: ``consumed``, the examples handed out so far, and ``order``.
        """
        return {"consumed": self._consumed, "order": self._describe_order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved; another batch size is fine.

        Raises:
            ValueError: If the state belongs to another stream: other dataset sizes, weights, seed,
                shard or shuffling; or if it has no position.
        """
        saved = state.get("order", {})
        current = self._describe_order()
        differing = [name for name in current if saved.get(name) != current[name]]
        if differing:
            changes = ", ".join(f"{n} {saved.get(n)!r} -> {current[n]!r}" for n in differing)
            raise ValueError(f"cannot resume {self._name} in another order of examples: {changes}")
        consumed = state["consumed"]
        if type(consumed) is not int or consumed < 0:
            raise ValueError(f"consumed must be a whole number, at least 0, got {consumed!r}")
        self._consumed = consumed
        self._batches = None

    def last_examples(self, count: int) -> list[int]:
        """Return the places in their dataset of the last ``count`` examples, oldest first."""
        return [index for _, index in self._last(count)]

    def describe_last(self, count: int, skip: int = 0) -> str:
        """Name the ``count`` examples before the last ``skip``, for messages."""
        places = self._last(count + skip)[:count]
        if len(self.datasets) == 1:
            return f"examples {[index for _, index in places]} of the dataset"
        names = [_describe(self.datasets[n], self._paths[n], index) for n, index in places]
        return ", ".join(names)

    def close(self) -> None:
        """Stop the processes and release the files."""
        self._closed = True
        self._batches = None  # its destructor stops the processes
        for dataset in self.datasets:
            if hasattr(dataset, "close"):
                dataset.close()

    @property
    def dataset(self) -> Any:
        """The dataset, or the first of several."""
        return self.datasets[0]

    @property
    def shard_size(self) -> int:
        """Examples in one pass over the shard; the last shard may have fewer."""
        return sum(order.shard_size for order in self._order.orders)

    @property
    def _name(self) -> str:
        return ", ".join(self._paths)

    @property
    def _num_processes(self) -> int:
        return min(self.options.num_workers, _count_cpus())

    def _last(self, count: int) -> list[tuple[int, int]]:
        """Dataset and place of the last examples."""
        count = min(count, self._consumed)
        batches = self._order.start_at(self._consumed - count)
        examples = ((number, index) for number, indices in batches for index in indices)
        return list(itertools.islice(examples, count))

    def _log_order(self) -> None:
        weights = self._order.weights
        for path, order, weight in zip(self._paths, self._order.orders, weights, strict=True):
            share = f"; {weight / sum(weights):.2%} of the batches" if len(weights) > 1 else ""
            logger.info(
                f"{path}: shard {order.shard_id} of {order.num_shards} has up to "
                f"{order.shard_size} of {order.num_examples} examples, shuffling window "
                f"{order.window}, {self._num_processes} processes{share}"
            )

    def _describe_order(self) -> dict[str, Any]:
        orders = [asdict(order) for order in self._order.orders]
        if len(orders) == 1:
            return orders[0]
        return {"datasets": orders, "weights": list(self._order.weights)}

    def _start(self) -> Iterator[Batch]:
        """Return the batches from the current position on."""
        options = (self._worker, self.options.contiguous)
        batches = _BatchDataset(self.datasets, self._paths, *options)
        samples = _list_samples(self._order, self._consumed)
        if self._num_processes == 0:
            return map(batches.__getitem__, samples)
        atexit.register(_close, weakref.ref(self))
        return iter(
            torch.utils.data.DataLoader(
                batches,
                sampler=samples,
                batch_size=None,
                collate_fn=_keep,
                num_workers=self._num_processes,
                prefetch_factor=self.options.queue_depth,
                timeout=self.options.timeout,
                multiprocessing_context=self.options.start_method or "fork",
                worker_init_fn=_leave_signals_to_parent,
                generator=torch.Generator(),  # leaves the global one to the training
            )
        )

    def _check_size(self) -> None:
        size = sum(map(len, self.datasets))
        if self.options.max_examples not in (None, size):
            raise ValueError(
                f"max_examples must be the {size} examples of {self._name}, "
                f"got {self.options.max_examples}"
            )

    def _check_memory(self) -> None:
        """Check that the batches that are prepared at once do not exceed all memory."""
        largest = max(getattr(part, "num_bytes", 0) // len(part) for part in self.datasets)
        depth = self.options.queue_depth
        batches = 1 + self._num_processes * depth
        needed = (largest + EXAMPLE_BYTES) * self.options.batch_size * batches
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ValueError(
                f"batch_size {self.options.batch_size} does not fit in memory: with "
                f"{self._num_processes} processes and queue_depth {depth} the batches need "
                f"{needed / 1e9:.3g} GB, this machine has {memory / 1e9:.3g} GB"
            )


def _close(loader: "weakref.ref[DataLoader]") -> None:
    """Close a loader that a program left open, before Python ends its processes itself."""
    found = loader()
    if found is not None:
        found.close()


class FeatureDataLoader(DataLoader):
    """Batches of cached VAE moments with their prompts.

    ``next()`` returns ``[{"latents": ..., "prompt": ..., "motion_flow": ...}]``: a float16 array
    (B, 2C, ...), B captions, cached states or labels, and B floats if the dataset has flows.

    Args:
        dataset: See ``DataLoader``.
        **kwargs: See ``LoaderOptions``.

    Raises:
        ValueError: If a dataset holds VQ codes or declares other types than the loader reads. See
            ``DataLoader`` for other errors.
    """

    def __init__(self, dataset: Folders, **kwargs: Any) -> None:
        super().__init__(dataset, FeatureWorker, **kwargs)
        for path, dataset in zip(self._paths, self.datasets, strict=True):
            features = getattr(dataset, "features", {})
            check_features(features, path)
            if "codes" in features and "moments" not in features:
                raise ValueError(
                    f"{path} holds VQ 'codes', which no training pipeline can use; "
                    "it needs VAE 'moments'"
                )


def _list_samples(order: BatchOrder, position: int) -> Iterator[Samples]:
    """The samples of one batch after the other, from a position on."""
    for number, indices in order.start_at(position):
        yield number, position, indices
        position += len(indices)


def _own_message(error: RecordError) -> str:
    """The message without the traceback that PyTorch adds to errors of its processes."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rstrip().rpartition(f"{RecordError.__module__}.RecordError: ")[2]


class _BatchDataset(torch.utils.data.Dataset):
    """Reads and transforms a batch of samples; works in any process."""

    def __init__(
        self, datasets: Sequence[Any], paths: Sequence[str], worker: Worker, contiguous: bool
    ) -> None:
        self._datasets = datasets
        self._paths = paths
        self._worker = worker
        self._contiguous = contiguous

    def __getitem__(self, samples: Samples) -> Batch:
        # Each example is copied into the batch before the next one is read, into the same memory.
        number, position, indices = samples
        batch: Batch = {}
        for place, index in enumerate(indices):
            outputs = self._load(number, index, position + place)
            if place == 0:
                batch = self._empty_batch(outputs, len(indices))
            self._check_alike(batch, outputs, number, (indices[0], index))
            for name, values in outputs.items():
                if name == "latents" and self._contiguous:
                    batch[name][place] = values[0]
                else:
                    batch[name] += [_own(value) for value in values]
        return batch

    def _empty_batch(self, outputs: Mapping[str, list[Any]], size: int) -> Batch:
        batch: Batch = {name: [] for name in outputs}
        if self._contiguous:
            latents = outputs["latents"][0]
            batch["latents"] = np.empty((size, *latents.shape), latents.dtype)
        return batch

    def _load(self, number: int, index: int, position: int) -> dict[str, list[Any]]:
        dataset = self._datasets[number]
        is_ours = type(dataset) is RecordDataset
        example = dataset.view(index) if is_ours else dataset[index]  # views are copied
        try:
            return self._worker.process(example, position)
        except (LookupError, TypeError, ValueError) as error:
            name = _describe(dataset, self._paths[number], index)
            raise RecordError(f"{name}: {error}") from error

    def _check_alike(
        self, batch: Batch, outputs: Mapping[str, list[Any]], number: int, pair: tuple[int, int]
    ) -> None:
        """Check that an example has the outputs of the first one, and latents of its shape."""
        if outputs.keys() != batch.keys():
            raise RecordError(
                f"{self._describe_pair(number, pair)} differ: {sorted(batch)} and "
                f"{sorted(outputs)} in one batch"
            )
        if not self._contiguous:
            return
        first_shape, shape = batch["latents"].shape[1:], outputs["latents"][0].shape
        if shape != first_shape:
            raise RecordError(
                f"{self._describe_pair(number, pair)} have latents of the shapes {first_shape} and "
                f"{shape} in one batch; pass contiguous=False to get a list"
            )

    def _describe_pair(self, number: int, pair: tuple[int, int]) -> str:
        dataset, path = self._datasets[number], self._paths[number]
        return " and ".join(_describe(dataset, path, index) for index in pair)


def _describe(dataset: Any, path: str, index: int) -> str:
    """Name an example for messages."""
    if hasattr(dataset, "describe"):
        return dataset.describe(index)
    return f"example {index} of {path}"


def _own(value: Any) -> Any:
    """Return a copy of an array: the transforms return read-only views."""
    return value.copy() if isinstance(value, np.ndarray) else value


def _keep(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(worker: int) -> None:
    """Outlive a signal to the whole job: the process that reads may still need its batches."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    """End this process by a SIGTERM of the process that started it, and of no other."""
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def _count_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
