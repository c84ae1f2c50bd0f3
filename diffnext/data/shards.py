"""The files of a shard: checked when a dataset is opened, then read from any process.

    00000.index    a line "<byte offset> <byte length>" for each record
    00000.data     the records, one after the other
    00000.xxh3     a checksum of each record (XXH3, 64 bits, little-endian); optional

Records are read with ``pread`` and not through mapped memory: reading beyond the end of a file that
was cut short would end the process there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from diffnext.data.plain_files import open_plain
from diffnext.data.record_format import RecordError

DATA_SUFFIX = ".data"
INDEX_SUFFIX = ".index"
CHECKSUM_SUFFIX = ".xxh3"
SUFFIXES = (DATA_SUFFIX, INDEX_SUFFIX, CHECKSUM_SUFFIX)

CHECKSUM = np.dtype("<u8")
INDEX_BLOCK = 2**22  # bytes parsed at a time
MAX_INDEX_LINE = 64  # bytes
DIGITS = b"0123456789"
MAX_DIGITS = 18  # such numbers and their sums fit in 64 bits
LIMIT = 10**MAX_DIGITS
INDEX_LINE = re.compile(rb"\d{1,%d} \d{1,%d}" % (MAX_DIGITS, MAX_DIGITS))
MAX_RECORD = 2**31 - 2**12  # bytes that one read returns at most


@dataclass(frozen=True, eq=False)
class Shard:
    """One pair of files.

    Attributes:
        data_path: The file of the records.
        data_size: Its size in bytes.
        changed: Time of its last change, in nanoseconds.
        spans: Byte offset and length of each record, (records, 2) of int64.
        checksums: Checksum of each record, (records,) of uint64; None if there are none.
    """

    data_path: Path
    data_size: int
    changed: int
    spans: np.ndarray
    checksums: np.ndarray | None

    def __len__(self) -> int:
        return len(self.spans)

    def open_data(self) -> BinaryIO:
        """Open the file of the records.

        Raises:
            RecordError: If it cannot be opened.
        """
        try:
            return open_plain(self.data_path)
        except OSError as error:
            raise RecordError(f"{self.data_path} cannot be read: {error.strerror}") from error

    def read(self, number: int, descriptor: int) -> bytes:
        """A record, as it was written.

        Args:
            number: Number of the record.
            descriptor: Descriptor of the open file of the records.

        Raises:
            RecordError: If the file changed since the dataset was opened, cannot be read, or the
                record does not match its checksum.
        """
        offset, length = self.spans[number].tolist()
        try:
            record = os.pread(descriptor, length, offset)
            state = os.fstat(descriptor)
        except OSError as error:
            raise RecordError(f"{self.data_path} cannot be read: {error.strerror}") from error
        is_same = (state.st_size, state.st_mtime_ns) == (self.data_size, self.changed)
        if not is_same or state.st_nlink == 0 or len(record) != length:
            raise RecordError(
                f"{self.data_path} was changed, replaced or deleted since it was opened; a "
                "dataset must stay as it is while it is read"
            )
        if self.checksums is None or xxhash.xxh3_64_intdigest(record) == self.checksums[number]:
            return record
        path = self.data_path.with_suffix(CHECKSUM_SUFFIX)
        raise RecordError(f"its checksum is not the one in {path}")


def open_shard(index_path: Path) -> Shard:
    """Check the files of a shard, and read its index and checksums.

    Args:
        index_path: Path of the index; the other files lie beside it.

    Raises:
        RecordError: If a line of the index breaks a rule, the data file is missing or shorter than
            the index says, the number of checksums is wrong, or a file is not a regular file.
    """
    data_path = index_path.with_suffix(DATA_SUFFIX)
    try:
        with open_plain(data_path) as file:
            state = os.fstat(file.fileno())
    except FileNotFoundError:
        raise RecordError(f"{index_path} has no data file {data_path.name} beside it") from None
    spans = _read_spans(index_path)
    _check_spans(spans, index_path, state.st_size)
    checksums = _read_checksums(index_path.with_suffix(CHECKSUM_SUFFIX), len(spans))
    return Shard(data_path, state.st_size, state.st_mtime_ns, spans, checksums)


def _read_spans(index_path: Path) -> np.ndarray:
    blocks = [np.empty((0, 2), np.int64)]
    num_lines = 0
    with open_plain(index_path) as file:
        while text := file.read(INDEX_BLOCK) + file.readline(MAX_INDEX_LINE):
            blocks.append(_parse_lines(text, index_path, num_lines))
            num_lines += len(blocks[-1])
    return np.concatenate(blocks)


def _parse_lines(text: bytes, index_path: Path, num_before: int) -> np.ndarray:
    """Parse lines of an index, all at once: one by one a million of them take a second.

    Args:
        text: Whole lines.
        index_path: Path of the index, for messages.
        num_before: Lines before these.
    """
    if not text.endswith(b"\n"):
        text += b"\n"
    separators = text.translate(None, delete=DIGITS)
    num_lines = len(separators) // 2
    if separators == b" \n" * num_lines:
        numbers = np.fromstring(text, np.int64, sep=" ")  # too large numbers become 2**63 - 1
        if len(numbers) == 2 * num_lines and numbers.max() < LIMIT:
            return numbers.reshape(-1, 2)
    lines = text.split(b"\n")
    line = next(i for i, found in enumerate(lines) if not INDEX_LINE.fullmatch(found))
    raise RecordError(
        f"{index_path}, line {num_before + line + 1}: expected '<offset> <length>', each of 1 to "
        f"{MAX_DIGITS} digits, got {lines[line][:MAX_INDEX_LINE]!r}"
    )


def _check_spans(spans: np.ndarray, index_path: Path, data_size: int) -> None:
    ends = spans[:, 0] + spans[:, 1]
    too_far, too_long = ends > data_size, spans[:, 1] > MAX_RECORD
    wrong = too_far | too_long
    if not wrong.any():
        return
    number = int(wrong.argmax())
    place = f"{index_path}, line {number + 1}"
    if too_far[number]:
        raise RecordError(
            f"{index_path.with_suffix(DATA_SUFFIX)} is truncated: example {number} of it ends "
            f"at byte {ends[number]}, the file has {data_size} bytes ({place})"
        )
    raise RecordError(
        f"{place}: a record must have at most {MAX_RECORD} bytes, got {spans[number, 1]}"
    )


def _read_checksums(path: Path, count: int) -> np.ndarray | None:
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != count * CHECKSUM.itemsize:
                raise RecordError(
                    f"{path} must have {CHECKSUM.itemsize} bytes for each of {count} records, got "
                    f"{size} bytes: delete it if it belongs to other records"
                )
            return np.frombuffer(file.read(size), CHECKSUM)
    except FileNotFoundError:
        return None
