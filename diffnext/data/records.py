"""Record datasets: a folder of examples with random access.

A dataset is a flat folder in the format of the ``codewithgpu`` package, version 1::

    METADATA        JSON object: entries, features, version
    00000.index     one line "<byte offset> <byte length>" for each example
    00000.data      the records back to back
    00001.index     further shards, if there are more than ``max_examples`` examples
    ...

Neither ``codewithgpu`` nor ``protobuf`` is needed to write or to read one.
"""

import bisect
import contextlib
import itertools
import json
import mmap
import operator
import os
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter

from diffnext.data.plain_files import open_plain, read_typed
from diffnext.data.record_format import (
    Descriptor,
    RecordError,
    decode_example,
    encode_example,
    normalize_features,
)

__all__ = [
    "Metadata",
    "RecordDataset",
    "RecordError",
    "RecordSubset",
    "RecordWriter",
    "Shard",
    "copy_records",
    "find_datasets",
    "open_subset",
    "read_metadata",
    "write_metadata",
]

METADATA_NAME = "METADATA"
MAX_INDEX_LINE = 64  # bytes
# Numbers of 18 digits and their sums fit in 64 bits.
INDEX_LINE = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*")


@dataclass(frozen=True)
class Metadata:
    """What METADATA holds.

    Attributes:
        entries: Examples of all shards.
        features: Normalized descriptor.
        version: Of the format.
    """

    entries: Annotated[int, Field(ge=1, lt=2**63, strict=True)]
    features: Annotated[dict[str, Any], AfterValidator(normalize_features)]
    version: Literal[1]


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read METADATA.

    Args:
        path: Dataset folder.

    Raises:
        FileNotFoundError: If there is none; the message names the datasets in the folder, if any.
        RecordError: If it is malformed.
    """
    try:
        return read_typed(Path(path) / METADATA_NAME, TypeAdapter(Metadata))
    except (FileNotFoundError, NotADirectoryError):
        nested = [folder.name for folder in _nested_datasets(Path(path))]
        hint = f"; the datasets in it are {', '.join(nested)}" if nested else ""
        raise FileNotFoundError(
            f"{path} is not a dataset: it has no {METADATA_NAME}{hint}"
        ) from None


def find_datasets(path: str | os.PathLike[str]) -> list[Path]:
    """The dataset in a folder, or those of several sizes in its folders.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path)
    if os.path.lexists(folder / METADATA_NAME):
        return [folder]
    found = _nested_datasets(folder)
    if not found:
        raise FileNotFoundError(f"{folder} is not a dataset: it has no {METADATA_NAME}")
    return found


def _nested_datasets(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.glob(f"*/{METADATA_NAME}")]
    return sorted(path for path in found if not path.is_symlink())


class RecordWriter:
    """Writes the examples of a new dataset.

    METADATA is written by ``close()``, also at the end of a ``with`` block that failed, so that
    what was written until then stays readable. Without it a folder is not a dataset.

    Args:
        path: Existing folder that holds no dataset yet.
        features: Feature name to type: ``bytes``, ``string``, ``float``, ``int`` (also with their
            bit widths; stored as 32-bit floats and 64-bit integers), a list of one type, or a
            nested mapping.
        max_examples: Examples per shard.
        zfill_width: Digits of a shard name.

    Raises:
        FileNotFoundError: If the folder does not exist.
        RecordError: If a type is unknown, or the folder already holds records.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        features: Mapping[str, Any],
        max_examples: int = 2**63 - 1,
        zfill_width: int = 5,
    ) -> None:
        if max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {max_examples}")
        self.path = Path(path)
        self.features = normalize_features(features)
        self.max_examples = max_examples
        self.zfill_width = zfill_width
        self._entries = 0
        self._files: tuple[BufferedWriter, BufferedWriter] | None = None  # data and index
        self._closed = False
        _check_new_dataset(self.path)

    def write(self, example: Mapping[str, Any]) -> None:
        """Append one example.

        Args:
            example: A value for every declared feature. Lists, tuples and arrays are list
                features; an array in a ``bytes`` feature is stored in C order.

        Raises:
            KeyError: If a name is undeclared or missing.
            TypeError: If a value does not have the declared type.
            RecordError: If an integer does not fit in 64 bits, or the shard file exists.
            RuntimeError: If the writer is closed.
        """
        self.write_record(encode_example(example, self.features))

    def write_record(self, record: bytes | memoryview) -> None:
        """Append one example that is serialized already.

        Args:
            record: What ``RecordDataset.record`` of a dataset with the same features returns.

        Raises:
            RecordError: If the shard file exists.
            RuntimeError: If the writer is closed.
        """
        if self._closed:
            raise RuntimeError(f"cannot write to {self.path}: the writer is closed")
        if self._files is None or self._entries % self.max_examples == 0:
            self._files = self._open_shard(self._entries // self.max_examples)
        data, index = self._files
        offset = data.tell()
        data.write(record)
        index.write(b"%d %d\n" % (offset, len(record)))
        self._entries += 1

    def close(self) -> None:
        """Close the files and write METADATA, unless no example was written."""
        if self._closed:
            return
        self._closed = True
        self._close_shard()
        if self._entries:
            write_metadata(self.path, self._entries, self.features)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_shard(self, number: int) -> tuple[BufferedWriter, BufferedWriter]:
        self._close_shard()
        stem = str(number).zfill(self.zfill_width)
        try:
            data = open(self.path / f"{stem}.data", "xb")
            return data, open(self.path / f"{stem}.index", "xb")
        except FileExistsError as error:
            raise RecordError(f"{error.filename} already exists") from error

    def _close_shard(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None


def copy_records(
    records: Iterable[tuple["RecordDataset", int]],
    path: str | os.PathLike[str],
    max_examples: int = 2**63 - 1,
) -> int:
    """Write records of datasets with the same features to a new one, as they are.

    Args:
        records: Dataset and number of each.
        path: Existing empty folder.
        max_examples: Examples per shard.

    Returns:
        The number of records.
    """
    writer = None
    count = 0
    for dataset, index in records:
        writer = writer or RecordWriter(path, dataset.features, max_examples)
        writer.write_record(dataset.record(index))
        count += 1
    if writer is not None:
        writer.close()
    return count


def write_metadata(
    path: str | os.PathLike[str], entries: int, features: Mapping[str, Descriptor]
) -> None:
    """Write METADATA, which makes a folder of shards a dataset.

    Args:
        path: The folder.
        entries: Examples of all shards.
        features: Normalized descriptor.
    """
    metadata = Metadata(entries, dict(features), version=1)
    temporary = Path(path) / f"{METADATA_NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(asdict(metadata), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(path) / METADATA_NAME)


def _check_new_dataset(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"the dataset folder {path} does not exist")
    for name in sorted(os.listdir(path)):
        if name == METADATA_NAME or name.endswith((".index", ".data")):
            raise RecordError(f"{path} already holds records ({name}); write to an empty folder")


@dataclass(frozen=True)
class Shard:
    """One pair of files.

    Attributes:
        data_path: The file of the records.
        data_size: Its bytes.
        spans: Byte offset and length of each record, (examples, 2) of int64.
    """

    data_path: Path
    data_size: int
    spans: np.ndarray


class RecordDataset:
    """Reads the examples of a dataset, in any order.

    The dataset has a cursor, which ``read()``, iteration and ``dataset[i]`` move, and can be
    pickled: the copy opens the files anew, with the cursor at the first example.

    Args:
        path: Dataset folder.

    Attributes:
        features: Normalized descriptor.
        shards: The pairs of files, in order.

    Raises:
        FileNotFoundError: If METADATA is missing.
        RecordError: If METADATA or an index is malformed, the number of index lines is not the
            one in METADATA, a data file is missing or shorter than its index says, or one of
            these files is a link or something else than a plain file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        metadata = read_metadata(self.path)
        self._entries, self.features = metadata.entries, metadata.features
        self.shards = [_read_shard(index_path) for index_path in _index_paths(self.path)]
        sizes = [len(shard.spans) for shard in self.shards]
        self._ends = list(itertools.accumulate(sizes))
        self._maps: dict[int, mmap.mmap] = {}
        self._cursor = 0
        self._closed = False
        self._check_entries()
        self._check_spans()

    @property
    def size(self) -> int:
        """Number of examples."""
        return self._entries

    @property
    def num_bytes(self) -> int:
        """Size of the data files."""
        return sum(shard.data_size for shard in self.shards)

    def __len__(self) -> int:
        return self._entries

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return example ``index`` and move the cursor past it.

        Raises:
            IndexError: If there is no such example.
            RecordError: If its record is corrupt.
        """
        self.seek(index)
        return self.read()

    def __iter__(self) -> "RecordDataset":
        return self

    def __next__(self) -> dict[str, Any]:
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the example at the cursor and move on.

        Raises:
            StopIteration: At the end.
            RecordError: If the record is corrupt.
            RuntimeError: If the dataset is closed.
        """
        if self._cursor >= self._entries and not self._closed:
            raise StopIteration
        self._cursor += 1
        return self._decode(self._cursor - 1)

    def seek(self, index: int) -> None:
        """Move the cursor to example ``index``; negative ones count from the end.

        Raises:
            IndexError: If there is no such example.
        """
        self._cursor = self._check_index(index)

    def tell(self) -> int:
        """Return the index of the next example ``read()`` returns."""
        return self._cursor

    def reset(self) -> None:
        """Move the cursor to the first example."""
        self._cursor = 0

    def view(self, index: int) -> dict[str, Any]:
        """Example ``index`` with read-only memory views in place of bytes; the cursor stays.

        Views keep the file's pages in use after ``close()``.

        Raises:
            IndexError: If there is no such example.
            RecordError: If its record is corrupt.
            RuntimeError: If the dataset is closed.
        """
        return self._decode(self._check_index(index), copies=False)

    def record(self, index: int) -> bytes:
        """Example ``index`` as it is stored; the cursor stays.

        Raises:
            IndexError: If there is no such example.
            RuntimeError: If the dataset is closed.
        """
        buffer, start, end = self._find(self._check_index(index))
        return bytes(buffer[start:end])

    def close(self) -> None:
        """Release the files; those that views look at go with the last view."""
        self._closed = True
        for data in self._maps.values():
            with contextlib.suppress(BufferError):
                data.close()
        self._maps.clear()

    def describe(self, index: int) -> str:
        """Return file and number of an example, for messages."""
        shard_number, local_index = self._locate(index)
        data_path = self.shards[shard_number].data_path
        return f"example {index} (number {local_index} in {data_path})"

    def __enter__(self) -> "RecordDataset":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["RecordDataset"], tuple[Path]]:
        return RecordDataset, (self.path,)  # memory maps cannot travel to another process

    def _locate(self, index: int) -> tuple[int, int]:
        shard_number = bisect.bisect_right(self._ends, index)
        shard_start = self._ends[shard_number] - len(self.shards[shard_number].spans)
        return shard_number, index - shard_start

    def _check_index(self, index: int) -> int:
        position = operator.index(index)
        if position < 0:
            position += self._entries
        if not 0 <= position < self._entries:
            raise IndexError(f"{self.path} has {self._entries} examples, no example {index}")
        return position

    def _decode(self, index: int, copies: bool = True) -> dict[str, Any]:
        buffer, start, end = self._find(index)
        try:
            return decode_example(buffer, (start, end), self.features, copies)
        except RecordError as error:
            raise RecordError(f"{self.describe(index)} is corrupt: {error}") from error

    def _find(self, index: int) -> tuple[mmap.mmap | bytes, int, int]:
        """The buffer that holds an example, its first byte and the one past its last."""
        if self._closed:
            raise RuntimeError(f"cannot read {self.path}: the dataset is closed")
        shard_number, local_index = self._locate(index)
        offset, length = self.shards[shard_number].spans[local_index].tolist()
        return self._open_map(shard_number), offset, offset + length

    def _open_map(self, shard_number: int) -> mmap.mmap | bytes:
        shard = self.shards[shard_number]
        if shard.data_size == 0:
            return b""  # an empty file cannot be mapped
        if shard_number not in self._maps:
            self._maps[shard_number] = _map_file(shard.data_path, shard.data_size)
        return self._maps[shard_number]

    def _check_entries(self) -> None:
        indexed = self._ends[-1] if self._ends else 0
        if indexed != self._entries:
            raise RecordError(
                f"{self.path}: METADATA lists {self._entries} examples, "
                f"its {len(self.shards)} index files {indexed}"
            )

    def _check_spans(self) -> None:
        for shard, shard_end in zip(self.shards, self._ends, strict=True):
            ends = shard.spans.sum(axis=1)
            beyond = np.flatnonzero(ends > shard.data_size)
            if len(beyond):
                local_index = int(beyond[0])
                index = shard_end - len(shard.spans) + local_index
                raise RecordError(
                    f"{shard.data_path} is truncated: example {index} (number {local_index} in "
                    f"the file) ends at byte {ends[local_index]}, the file has "
                    f"{shard.data_size} bytes"
                )


@dataclass(frozen=True)
class RecordSubset:
    """Consecutive examples of a dataset, in the place of a whole one.

    Attributes:
        dataset: The dataset.
        start: Its first example that belongs to the subset.
        stop: The first one after it.
    """

    dataset: RecordDataset
    start: int
    stop: int

    @property
    def features(self) -> dict[str, Descriptor]:
        """Types of the features."""
        return self.dataset.features

    @property
    def num_bytes(self) -> int:
        """Share of the subset in the data files, as if all examples had one size."""
        return self.dataset.num_bytes * len(self) // len(self.dataset)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a subset of {len(self)}")
        return self.dataset[self.start + index]

    def view(self, index: int) -> dict[str, Any]:
        """As of the dataset."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a subset of {len(self)}")
        return self.dataset.view(self.start + index)

    def describe(self, index: int) -> str:
        """Name an example for messages."""
        return self.dataset.describe(self.start + index)

    def close(self) -> None:
        """Release the files."""
        self.dataset.close()


def open_subset(path: str | os.PathLike[str], start: int, stop: int) -> RecordSubset:
    """Open the examples ``start`` to ``stop`` (exclusive) of a dataset.

    Raises:
        ValueError: If there are no such examples, and for what ``RecordDataset`` lists.
    """
    dataset = RecordDataset(path)
    if not 0 <= start < stop <= len(dataset):
        raise ValueError(f"{path} has {len(dataset)} examples, none from {start} to {stop}")
    return RecordSubset(dataset, start, stop)


def _map_file(path: Path, size: int) -> mmap.mmap:
    with open_plain(path) as file:
        try:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, OverflowError, ValueError) as error:
            raise RecordError(f"{path} cannot be read as {size} bytes: {error}") from error


def _index_paths(path: Path) -> list[Path]:
    """Return the index files by shard number: 99999 before 100000."""
    return sorted(path.glob("*.index"), key=_shard_order)


def _shard_order(path: Path) -> tuple[bool, int, str]:
    if path.stem.isdecimal():
        return False, int(path.stem), path.stem
    return True, 0, path.stem  # names that are no numbers come last, by letter


def _read_shard(index_path: Path) -> Shard:
    data_path = index_path.with_suffix(".data")
    try:
        with open_plain(data_path) as file:
            data_size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise RecordError(f"{index_path} has no data file {data_path.name} beside it") from None
    return Shard(data_path, data_size, _read_spans(index_path))


def _read_spans(index_path: Path) -> np.ndarray:
    spans = array("q")
    with open_plain(index_path) as file:
        for line in iter(lambda: file.readline(MAX_INDEX_LINE), b""):
            match = INDEX_LINE.fullmatch(line)
            if match is None:
                raise RecordError(
                    f"{index_path}, example {len(spans) // 2}: expected '<offset> <length>', got "
                    f"{line!r}"
                )
            spans.extend((int(match[1]), int(match[2])))
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
