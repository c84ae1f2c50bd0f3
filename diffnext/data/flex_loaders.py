"""Endless, reproducible and resumable loaders of training batches."""

import difflib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils.data

from diffnext.data.example_order import ExampleOrder
from diffnext.data.flex_pipelines import FeatureWorker, Worker
from diffnext.data.flex_transforms import check_features
from diffnext.data.records import RecordDataset, RecordError, RecordSubset

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Any]
Samples: TypeAlias = list[tuple[int, int]]  # (position in the stream, index in the dataset)

EXAMPLE_BYTES = 1024  # of Python objects around the data of an example


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Keyword arguments of the loaders.

    Attributes:
        seed: Seed of the order and of the caption choice; ``shard_id`` is added to it.
        shuffle: Whether to shuffle.
        shard_id: The shard to read, from 0.
        num_shards: Number of shards, usually one for each training process.
        batch_size: Examples in a batch.
        num_workers: Processes that read and transform, at most one for each available CPU; 0
            means to do so in ``next()``. Batches are the same for any number.
        queue_depth: Batches each process prepares ahead.
        contiguous: Stack the latents into one array; otherwise leave a list of arrays.
        initial_fill: Size of the shuffling window, in examples.
        stick_to_partition: Read the same shard in every pass, instead of the next one.
        dataset_getter: Opens the dataset, called as ``dataset_getter(path=path)``;
            ``RecordDataset`` by default. The result needs ``len()`` and ``[index]``, and must be
            picklable if processes are spawned.
        max_examples: Number of examples the dataset is known to have; checked if given.
        prefetch_count: Accepted and ignored: nothing is gained from filling a large buffer before
            the first batch.
        start_method: How to start the processes. By default ``fork`` where there is such a thing:
            it starts in milliseconds and does not run the training script again.
        timeout: Seconds to wait for a batch of a process before giving up; 0 means for ever.

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
        for name in ("seed", "shard_id", "num_workers"):
            self._check_at_least(name, 0)
        for name in ("num_shards", "batch_size", "queue_depth", "initial_fill"):
            self._check_at_least(name, 1)
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

    def make_order(self, num_examples: int) -> ExampleOrder:
        """The order of the examples of a dataset.

        Raises:
            ValueError: If a shard would be empty.
        """
        return ExampleOrder(
            num_examples=num_examples,
            shard_id=self.shard_id,
            num_shards=self.num_shards,
            shuffle=self.shuffle,
            initial_fill=self.initial_fill,
            seed=self.seed + self.shard_id,
            stick_to_partition=self.stick_to_partition,
        )

    def _check_at_least(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


class DataLoaderBase(ABC):
    """An endless iterator over batches that can be closed, saved and restored."""

    @abstractmethod
    def next(self) -> list[Batch]:
        """Return the next batch, in a list of its own."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream of examples."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position."""

    @abstractmethod
    def last_examples(self, count: int) -> list[int]:
        """Return the places in the dataset of the last ``count`` examples, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """Stop the processes and release the files."""

    def __next__(self) -> list[Batch]:
        return self.next()

    def __call__(self) -> list[Batch]:
        """Return the next batch, in a list of its own."""
        return self.next()

    def __iter__(self) -> "DataLoaderBase":
        return self

    def __enter__(self) -> "DataLoaderBase":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DataLoader(DataLoaderBase):
    """Batches of a record dataset.

    Position n of the stream of examples has the same example and the same random choices for
    whatever number of processes, so the number of examples consumed is all there is to save. A
    batch that fails does not count: the next call tries it again.

    Args:
        dataset: Dataset folder.
        worker: Class of the example pipeline.
        **kwargs: See ``LoaderOptions``.

    Raises:
        FileNotFoundError: If there is no dataset.
        TypeError: If an argument is unknown, or has the wrong type.
        ValueError: If an argument is out of range, the dataset is malformed or has another size
            than ``max_examples``, a shard would be empty, or a batch would not fit in memory.
    """

    def __init__(
        self, dataset: str | os.PathLike[str], worker: Callable[[], Worker], **kwargs: Any
    ) -> None:
        self.options = LoaderOptions.from_keywords(kwargs)
        open_dataset = self.options.dataset_getter or RecordDataset
        self.dataset = open_dataset(path=dataset)
        self._path = os.fspath(dataset)
        self._order = self.options.make_order(len(self.dataset))
        self._worker = worker()
        self._worker.seed = self._order.seed
        self._consumed = 0
        self._batches: Iterator[Batch] | None = None
        self._closed = False
        self._check_size()
        self._check_memory()
        logger.info(
            "%s: shard %d of %d has up to %d of %d examples, shuffling window %d, %d processes",
            self._path,
            self._order.shard_id,
            self._order.num_shards,
            self._order.shard_size,
            self._order.num_examples,
            self._order.window,
            self._num_processes,
        )

    def next(self) -> list[Batch]:
        """Return the next batch, in a list of its own.

        Returns:
            One dict with ``latents``, (B, ...) or a list of B arrays, and a list of B values for
            each other output of the pipeline.

        Raises:
            RecordError: If an example is corrupt or malformed; it names file and example.
            RuntimeError: If a process died or took too long, or the loader is closed.
        """
        if self._closed:
            raise RuntimeError(f"cannot read {self._path}: the loader is closed")
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
            self._consumed += self.options.batch_size
        except RuntimeError as error:
            self._batches = None
            raise RuntimeError(
                f"{self._path}: no batch at position {self._consumed} of the stream: {error}"
            ) from error
        except Exception as error:
            self._batches = None
            if isinstance(error, RecordError):
                raise RecordError(_own_message(error)) from error
            raise
        return [batch]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and what the stream depends on.

        Returns:
            Plain numbers: ``consumed``, the examples handed out so far, and ``order``.
        """
        return {"consumed": self._consumed, "order": asdict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved; another batch size is fine.

        Raises:
            ValueError: If the state belongs to another stream: other dataset size, seed, shard or
                shuffling.
        """
        saved = state.get("order", {})
        current = asdict(self._order)
        differing = [name for name in current if saved.get(name) != current[name]]
        if differing:
            changes = ", ".join(f"{n} {saved.get(n)!r} -> {current[n]!r}" for n in differing)
            raise ValueError(f"cannot resume {self._path} in another order of examples: {changes}")
        self._consumed = int(state["consumed"])
        self._batches = None

    def last_examples(self, count: int) -> list[int]:
        """Return the places in the dataset of the last ``count`` examples, oldest first."""
        count = min(count, self._consumed)
        return list(itertools.islice(self._order.start_at(self._consumed - count), count))

    def close(self) -> None:
        """Stop the processes and release the files."""
        self._closed = True
        self._batches = None  # its destructor stops the processes
        if hasattr(self.dataset, "close"):
            self.dataset.close()

    @property
    def shard_size(self) -> int:
        """Examples in one pass over the shard; the last shard may have fewer."""
        return self._order.shard_size

    @property
    def _num_processes(self) -> int:
        return min(self.options.num_workers, _count_cpus())

    def _start(self) -> Iterator[Batch]:
        """Return the batches from the current position on."""
        samples = _SampleStream(self._order, self._consumed, self.options.batch_size)
        batches = _BatchDataset(self.dataset, self._path, self._worker, self.options.contiguous)
        if self._num_processes == 0:
            return map(batches.__getitem__, samples)
        return iter(
            torch.utils.data.DataLoader(
                batches,
                sampler=samples,
                batch_size=None,
                collate_fn=_keep,
                num_workers=self._num_processes,
                prefetch_factor=self.options.queue_depth,
                timeout=self.options.timeout,
                multiprocessing_context=self.options.start_method or _default_start_method(),
                worker_init_fn=_leave_signals_to_parent,
                generator=torch.Generator(),  # leaves the global one to the training
            )
        )

    def _check_size(self) -> None:
        size = len(self.dataset)
        if self.options.max_examples not in (None, size):
            raise ValueError(
                f"max_examples must be the {size} examples of {self._path}, "
                f"got {self.options.max_examples}"
            )

    def _check_memory(self) -> None:
        """Check that the batches that are prepared at once do not exceed all memory."""
        mean = getattr(self.dataset, "num_bytes", 0) // len(self.dataset) + EXAMPLE_BYTES
        depth = self.options.queue_depth
        needed = mean * self.options.batch_size * (1 + self._num_processes * depth)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ValueError(
                f"batch_size {self.options.batch_size} does not fit in memory: with "
                f"{self._num_processes} processes and queue_depth {depth} the batches need "
                f"{needed / 1e9:.3g} GB, this machine has {memory / 1e9:.3g} GB"
            )


class FeatureDataLoader(DataLoader):
    """Batches of cached VAE moments with their prompts.

    ``next()`` returns ``[{"latents": ..., "prompt": ..., "motion_flow": ...}]``: a float16 array
    (B, 2C, ...), B captions, cached states or labels, and B floats if the dataset has flows.

    Args:
        dataset: Dataset folder.
        **kwargs: See ``LoaderOptions``.

    Raises:
        ValueError: If the dataset holds VQ codes or declares other types than the loader reads,
            and for what ``DataLoader`` lists.
    """

    def __init__(self, dataset: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(dataset, FeatureWorker, **kwargs)
        features = getattr(self.dataset, "features", {})
        check_features(features, self._path)
        if "codes" in features and "moments" not in features:
            raise ValueError(
                f"{self._path} holds VQ 'codes', which no training pipeline can use; "
                "it needs VAE 'moments'"
            )


def _own_message(error: RecordError) -> str:
    """The message without the traceback that PyTorch puts before that of a loading process."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rstrip().splitlines()[-1].partition("RecordError: ")[2]


class _SampleStream:
    """The samples of one batch after the other."""

    def __init__(self, order: ExampleOrder, start: int, batch_size: int) -> None:
        self._order = order
        self._start = start
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Samples]:
        indices = self._order.start_at(self._start)
        position = self._start
        while True:
            yield [(position + i, next(indices)) for i in range(self._batch_size)]
            position += self._batch_size


class _BatchDataset(torch.utils.data.Dataset):
    """Reads and transforms a batch of samples; works in any process."""

    def __init__(self, dataset: Any, path: str, worker: Worker, contiguous: bool) -> None:
        self._dataset = dataset
        is_ours = type(dataset) in (RecordDataset, RecordSubset)
        self._read = dataset.view if is_ours else dataset.__getitem__  # views are copied below
        self._path = path
        self._worker = worker
        self._contiguous = contiguous

    def __getitem__(self, samples: Samples) -> Batch:
        outputs = [self._load(position, index) for position, index in samples]
        self._check_alike(samples, outputs)
        batch: Batch = {}
        for name in outputs[0]:
            values = [value for output in outputs for value in output[name]]
            if name == "latents" and self._contiguous:
                batch[name] = np.stack(values)
            else:
                batch[name] = [_own(value) for value in values]
        return batch

    def _load(self, position: int, index: int) -> dict[str, list[Any]]:
        example = self._read(index)
        try:
            return self._worker.process(example, position)
        except (LookupError, TypeError, ValueError) as error:
            raise RecordError(f"{self._describe(index)}: {error}") from error

    def _check_alike(self, samples: Samples, outputs: list[dict[str, list[Any]]]) -> None:
        """Check that the examples of a batch have the same outputs and latents of one shape."""
        names = outputs[0].keys()
        first_shape = outputs[0]["latents"][0].shape
        for (_, index), output in zip(samples, outputs, strict=True):
            if output.keys() != names:
                raise RecordError(
                    f"{self._describe_pair(samples[0][1], index)} differ: {sorted(names)} and "
                    f"{sorted(output)} in one batch"
                )
            shape = output["latents"][0].shape
            if self._contiguous and shape != first_shape:
                raise RecordError(
                    f"{self._describe_pair(samples[0][1], index)} have latents of the shapes "
                    f"{first_shape} and {shape} in one batch; pass contiguous=False to get a list"
                )

    def _describe_pair(self, first: int, second: int) -> str:
        return f"{self._describe(first)} and {self._describe(second)}"

    def _describe(self, index: int) -> str:
        if hasattr(self._dataset, "describe"):
            return self._dataset.describe(index)
        return f"example {index} of {self._path}"


def _own(value: Any) -> Any:
    """Return a copy of an array: what the transforms return are read-only views."""
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


def _default_start_method() -> str:
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _count_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
