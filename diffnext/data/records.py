"""Record datasets: a folder of examples with random access.

A dataset is a flat folder in the format of the ``codewithgpu`` package, version 1::

    METADATA        JSON object: entries, features, version
    00000.index     one line "<byte offset> <byte length>" for each example
    00000.data      the records back to back
    00000.xxh3      a checksum of each record; optional, and unknown to ``codewithgpu``
    00001.index     further shards, if there are more than ``max_examples`` examples
    ...

Neither ``codewithgpu`` nor ``protobuf`` is needed to write or to read one.
"""

import bisect
import copy
import itertools
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import xxhash
from pydantic import AfterValidator, Field, TypeAdapter

from diffnext.data.plain_files import read_typed
from diffnext.data.record_format import (
    Descriptor,
    RecordError,
    decode_example,
    encode_example,
    normalize_features,
)
from diffnext.data.shards import (
    CHECKSUM,
    CHECKSUM_SUFFIX,
    DATA_SUFFIX,
    INDEX_SUFFIX,
    SUFFIXES,
    open_shard,
)
from diffnext.utils.messages import did_you_mean

METADATA_NAME = "METADATA"
MAX_OPEN_FILES = 256  # of datasets that are read together; systems allow 1024 to a process


@dataclass(frozen=True)
class Metadata:
    """The content of METADATA.

    Attributes:
        entries: Number of examples in all shards.
        features: Normalized descriptor.
        version: Version of the format.
    """

    entries: Annotated[int, Field(ge=1, lt=2**63, strict=True)]
    features: Annotated[dict[str, Any], AfterValidator(normalize_features)]
    version: Literal[1]


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read METADATA.

    Args:
        path: Dataset folder.

    Raises:
        FileNotFoundError: If there is none; the message names the datasets in the folder, if any,
            or one with nearly the same name.
        RecordError: If it is malformed.
    """
    try:
        return read_typed(Path(path) / METADATA_NAME, TypeAdapter(Metadata))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(_explain_missing(Path(path))) from None


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a dataset, sound or not."""
    return os.path.lexists(Path(path) / METADATA_NAME)


def find_datasets(path: str | os.PathLike[str]) -> list[Path]:
    """The dataset in a folder, or the datasets of several sizes in its folders.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path)
    if is_dataset(folder):
        return [folder]
    found = _nested_datasets(folder)
    if not found:
        raise FileNotFoundError(_explain_missing(folder))
    return found


def _explain_missing(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder {folder}{did_you_mean(folder)}"
    nested = [path.name for path in _nested_datasets(folder)]
    hint = f"; the datasets in it are {', '.join(nested)}" if nested else ""
    return f"{folder} is not a dataset: it has no {METADATA_NAME}{hint}"


def _nested_datasets(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.glob(f"*/{METADATA_NAME}")]
    return sorted(path for path in found if not path.is_symlink())


class RecordWriter:
    """Writes the examples of a new dataset.

    METADATA is written by ``close()``, also at the end of a ``with`` block that failed, so the
    examples before the failure stay readable. A folder without METADATA is not a dataset.

    Args:
        path: Existing folder that holds no dataset yet.
        features: Feature name to type: ``bytes``, ``string``, ``float``, ``int`` (also with their
            bit widths; stored as 32-bit floats and 64-bit integers), a list of one type, or a
            nested mapping.
        max_examples: Examples per shard.
        zfill_width: Digits of a shard name.
        checksums: Whether to write a checksum of each record, for readers to compare with.

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
        checksums: bool = False,
    ) -> None:
        if max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {max_examples}")
        self.path = Path(path)
        self.features = normalize_features(features)
        self.max_examples = max_examples
        self.zfill_width = zfill_width
        self.suffixes = SUFFIXES if checksums else (DATA_SUFFIX, INDEX_SUFFIX)
        self._entries = 0
        self._files: dict[str, BufferedWriter] = {}  # of the current shard, by suffix
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
            RecordError: If an integer does not fit in 64 bits, a string holds half a character, or
                the shard file exists.
            RuntimeError: If the writer is closed.
        """
        self._check_open()
        self.write_record(encode_example(example, self.features))

    def write_record(self, record: bytes | memoryview) -> None:
        """Append one serialized example.

        Args:
            record: From ``RecordDataset.record`` of a dataset with the same features.

        Raises:
            RecordError: If the shard file exists.
            RuntimeError: If the writer is closed.
        """
        self._check_open()
        if self._entries % self.max_examples == 0:
            self._open_shard(self._entries // self.max_examples)
        offset = self._files[DATA_SUFFIX].tell()
        self._files[DATA_SUFFIX].write(record)
        self._files[INDEX_SUFFIX].write(b"%d %d\n" % (offset, len(record)))
        if CHECKSUM_SUFFIX in self._files:
            checksum = CHECKSUM.type(xxhash.xxh3_64_intdigest(record))
            self._files[CHECKSUM_SUFFIX].write(checksum.astype(CHECKSUM).tobytes())
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"cannot write to {self.path}: the writer is closed")

    def _open_shard(self, number: int) -> None:
        self._close_shard()
        stem = str(number).zfill(self.zfill_width)
        try:
            for suffix in self.suffixes:
                self._files[suffix] = open(self.path / f"{stem}{suffix}", "xb")
        except FileExistsError as error:
            raise RecordError(f"{error.filename} already exists") from error

    def _close_shard(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def copy_records(
    records: Iterable[tuple["RecordDataset", int]],
    path: str | os.PathLike[str],
    max_examples: int = 2**63 - 1,
) -> int:
    """Copy records of datasets with the same features to a new one, unchanged, with checksums.

    Args:
        records: For each record its dataset and its number there.
        path: Existing empty folder.
        max_examples: Examples per shard.

    Returns:
        The number of records.
    """
    writer = None
    count = 0
    for dataset, index in records:
        writer = writer or RecordWriter(path, dataset.features, max_examples, checksums=True)
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
        if name == METADATA_NAME or name.endswith(SUFFIXES):
            raise RecordError(f"{path} already holds records ({name}); write to an empty folder")


class RecordDataset:
    """Reads the examples of a dataset, in any order.

    The dataset has a cursor, which ``read()``, iteration and ``dataset[i]`` move. A copy, also by
    pickling, is open, and its cursor is at the first example. It keeps the content of the indexes
    instead of reading them again.

    Args:
        path: Dataset folder.

    Attributes:
        features: Normalized descriptor.
        shards: The pairs of files, in order.

    Raises:
        FileNotFoundError: If METADATA is missing.
        RecordError: If METADATA or an index is malformed, METADATA has another number of examples
            than the indexes, a data file is missing or shorter than its index says, the number of
            checksums is wrong, or one of these files is not a regular file. Reading raises it if a
            record is corrupt, or its file has changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        metadata = read_metadata(self.path)
        self._start, self._entries = 0, metadata.entries
        self.features = metadata.features
        self.shards = [open_shard(index_path) for index_path in _index_paths(self.path)]
        self._ends = list(itertools.accumulate(map(len, self.shards)))
        self._files: dict[int, BinaryIO] = {}  # open data files by number of the shard
        self._max_open_files = MAX_OPEN_FILES
        self._cursor = 0
        self._closed = False
        self._check_entries()

    @property
    def size(self) -> int:
        """Number of examples."""
        return self._entries

    @property
    def num_bytes(self) -> int:
        """Size of the data files; of a subset its share, as if all examples had one size."""
        total = sum(shard.data_size for shard in self.shards)
        return total * self._entries // self._ends[-1]

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
        """Example ``index`` with read-only memory views instead of bytes; the cursor stays.

        Views outlive ``close()``.

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
            RecordError: If its record does not match its checksum.
            RuntimeError: If the dataset is closed.
        """
        return self._read_record(self._check_index(index))

    def subset(self, start: int, stop: int) -> "RecordDataset":
        """A copy that holds only the examples ``start`` to ``stop`` (exclusive).

        Raises:
            ValueError: If there are no such examples.
        """
        if not 0 <= start < stop <= self._entries:
            raise ValueError(
                f"{self.path} has {self._entries} examples, none from {start} to {stop}"
            )
        part = copy.copy(self)
        part._start, part._entries = self._start + start, stop - start
        return part

    def close(self) -> None:
        """Release the files."""
        self._closed = True
        self._close_files()

    def describe(self, index: int) -> str:
        """Return file and number of an example, for messages."""
        shard_number, local_index = self._locate(index)
        data_path = self.shards[shard_number].data_path
        return f"example {self._start + index} (number {local_index} in {data_path})"

    def __enter__(self) -> "RecordDataset":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_cursor": 0, "_closed": False}

    def _locate(self, index: int) -> tuple[int, int]:
        place = self._start + index
        shard_number = bisect.bisect_right(self._ends, place)
        shard_start = self._ends[shard_number] - len(self.shards[shard_number])
        return shard_number, place - shard_start

    def _check_index(self, index: int) -> int:
        position = operator.index(index)
        if position < 0:
            position += self._entries
        if not 0 <= position < self._entries:
            raise IndexError(f"{self.path} has {self._entries} examples, no example {index}")
        return position

    def _decode(self, index: int, copies: bool = True) -> dict[str, Any]:
        record = self._read_record(index)
        try:
            return decode_example(record, (0, len(record)), self.features, copies)
        except RecordError as error:
            raise RecordError(f"{self.describe(index)} is corrupt: {error}") from error

    def _read_record(self, index: int) -> bytes:
        if self._closed:
            raise RuntimeError(f"cannot read {self.path}: the dataset is closed")
        shard_number, local_index = self._locate(index)
        try:
            file = self._open_file(shard_number)
            return self.shards[shard_number].read(local_index, file.fileno())
        except RecordError as error:
            raise RecordError(f"{self.describe(index)} cannot be used: {error}") from error

    def _open_file(self, shard_number: int) -> BinaryIO:
        if shard_number not in self._files:
            if len(self._files) >= self._max_open_files:
                self._close_files()
            self._files[shard_number] = self.shards[shard_number].open_data()
        return self._files[shard_number]

    def share_open_files(self, count: int) -> None:
        """Keep fewer files open, as so many datasets are read together."""
        self._max_open_files = max(1, MAX_OPEN_FILES // count)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _check_entries(self) -> None:
        indexed = self._ends[-1] if self._ends else 0
        if indexed != self._entries:
            raise RecordError(
                f"{self.path}: METADATA lists {self._entries} examples, "
                f"its {len(self.shards)} index files {indexed}"
            )


def find_damage(path: str | os.PathLike[str]) -> Iterator[str]:
    """Compare every record of a dataset with its checksum.

    Args:
        path: Dataset folder.

    Yields:
        A line for each problem, and for each file without checksums.

    Raises:
        FileNotFoundError: If there is no dataset.
        RecordError: If it cannot be opened.
    """
    with RecordDataset(path) as dataset:
        for shard in dataset.shards:
            if shard.checksums is None:
                yield f"{shard.data_path} has no checksums: it cannot be verified"
        for index in range(len(dataset)):
            try:
                dataset.record(index)
            except RecordError as error:
                yield str(error)


def _index_paths(path: Path) -> list[Path]:
    """Return the index files by shard number: 99999 before 100000."""
    return sorted(path.glob(f"*{INDEX_SUFFIX}"), key=_shard_order)


def _shard_order(path: Path) -> tuple[bool, int, str]:
    if path.stem.isdecimal():
        return False, int(path.stem), path.stem
    return True, 0, path.stem  # other names than numbers come last
