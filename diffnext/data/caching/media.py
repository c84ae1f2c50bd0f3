"""Where the bytes of a picture, a clip or a side file are, and which files are read."""

from __future__ import annotations

import codecs
import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.plain_files import open_plain
from diffnext.data.record_format import RecordError
from diffnext.utils.pictures import known_formats

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv".split()
)
SIDE_SUFFIXES = (".json", ".txt", ".cls")
TABLE_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
MAX_SUFFIXES = 8  # named in a summary
SYSTEM_FILES = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))

# What to do about files of a source that are not read.
ADVICE = {
    ".heic .heics .heif .heifs .hif": "pip install pillow-heif",
    ".jxl": "pip install pillow-jxl-plugin",
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2": "develop raw photographs to JPEG, PNG or TIFF",
    ".svg .eps .pdf .ai .psd .xcf": "save them as PNG",
    ".zip .rar .7z .gz .tgz .bz2 .xz .zst": "unpack them",
    ".part .crdownload .download": "downloads that did not end",
    ".tar .arrow": "make them, or a folder of them alone, the source",
    " ".join(TABLE_SUFFIXES): "make the table the source, or name it metadata, as in metadata.csv",
}

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like the next
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Media(ABC):
    """Bytes that can be opened."""

    __slots__ = ()

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open for reading, seekable.

        Raises:
            BadExample: If they cannot be opened.
        """

    @abstractmethod
    def stamp(self) -> list[int]:
        """Shows, without reading them, whether the bytes may have changed.

        Returns:
            See :func:`file_stamp`, of the file that they are in, and their place in it; empty if
            there is no such file.
        """

    def read(self, limit: int) -> bytes:
        """All bytes.

        Raises:
            BadExample: If they cannot be read, or are more than ``limit``.
        """
        with self.open() as file:
            try:
                content = file.read(limit + 1)
            except OSError as error:
                raise BadExample(f"cannot be read: {reason_of(error)}") from error
        if len(content) > limit:
            raise BadExample(f"more than {limit} bytes")
        return content


@dataclass(frozen=True, slots=True)
class FileMedia(Media):
    """A file.

    Attributes:
        path: Its path; links are followed.
    """

    path: str

    def open(self) -> BinaryIO:
        """Open the file if it is a regular one: a pipe or a device would block or never end."""
        try:
            return open_plain(self.path, follow_links=True)
        except RecordError as error:
            raise BadExample("is not a regular file") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise BadExample(f"cannot be opened: {reason_of(error)}") from error

    def stamp(self) -> list[int]:
        """Size and times of the file."""
        return file_stamp(self.path)


@dataclass(frozen=True, slots=True)
class SideFiles(Mapping[str, Media]):
    """The side files of a file, which differ from it in the suffix. By suffix, in small letters.

    Attributes:
        path: Path of the file.
        suffixes: Suffixes of its side files, as they are written.
    """

    path: str
    suffixes: tuple[str, ...]

    def __getitem__(self, suffix: str) -> FileMedia:
        for written in self.suffixes:
            if written.lower() == suffix:
                return FileMedia(os.path.splitext(self.path)[0] + written)
        raise KeyError(suffix)

    def __iter__(self) -> Iterator[str]:
        return iter([written.lower() for written in self.suffixes])

    def __len__(self) -> int:
        return len(self.suffixes)


@dataclass(frozen=True, slots=True)
class ArchiveMedia(Media):
    """A member of an uncompressed tar file.

    Attributes:
        archive: Path of the tar file.
        offset: First byte of the member's content.
        size: Bytes.
    """

    archive: str
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """Open the member in place; nothing is unpacked."""
        file = FileMedia(self.archive).open()
        held = os.fstat(file.fileno()).st_size - self.offset
        if held < self.size:
            file.close()
            raise BadExample(f"the archive is cut off: {max(held, 0)} of {self.size} bytes")
        return io.BufferedReader(_Section(file, self.offset, self.size))

    def stamp(self) -> list[int]:
        """Size and times of the archive, offset and size of the member."""
        archive = file_stamp(self.archive)
        return archive and [*archive, self.offset, self.size]


class _Section(io.RawIOBase):
    """A part of a file, as a file; closing it closes the file.

    Args:
        file: Open file.
        start: First byte.
        size: Bytes.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no byte {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        content = self._file.read(min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_cell(cell: Any, root: str) -> BinaryIO:
    """Open the file or the bytes in a cell of a table.

    Args:
        cell: Bytes, a path, or a mapping of ``bytes`` and ``path``.
        root: Folder that the path is relative to.

    Raises:
        BadExample: If it is neither, or the file cannot be opened.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return FileMedia(os.path.join(root, cell)).open()
    if isinstance(cell, bytes) and cell:
        return io.BytesIO(cell)
    raise BadExample("the table has neither bytes nor a path")


@contextmanager
def open_source(path: str) -> Iterator[BinaryIO]:
    """Open a table or archive.

    Raises:
        CacheError: If it cannot be opened, or not be read inside the ``with`` block.
    """
    try:
        with open_plain(path, follow_links=True) as file:
            yield file
    except RecordError as error:
        raise CacheError(str(error)) from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {reason_of(error)}") from error


def file_stamp(path: str) -> list[int]:
    """Size, and times of the last change, in nanoseconds; empty if there is no such file.

    The first time can be set, as tools that unpack do; the second, of the system, cannot. The
    number of the file is left out: some network file systems give it anew.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@functools.cache
def media_suffixes(kind: str) -> frozenset[str]:
    """Suffixes of the pictures that PIL reads here, or of videos.

    Args:
        kind: "images" or "videos".
    """
    if kind == "videos":
        return VIDEO_SUFFIXES
    formats = known_formats()
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix in suffixes if suffixes[suffix] in formats)


def suffix_of(name: str) -> str:
    """The last suffix of a name, in small letters."""
    return os.path.splitext(name)[1].lower()


def is_system_file(name: str) -> bool:
    """Whether a file of this name is an operating system's own, such as ``._cat.jpg``."""
    return name.startswith("._") or name in SYSTEM_FILES


def describe_unread(unread: Mapping[str, int], kind: str) -> list[str]:
    """Say what to do about files that were not read.

    Args:
        unread: Number of files by suffix.
        kind: Kind of the files that were read, "images" or "videos".

    Returns:
        A sentence for each suffix, the most frequent first; one for all beyond the first few.
    """
    ordered = sorted(unread.items(), key=lambda entry: (-entry[1], entry[0]))
    sentences = [
        _describe(f"{suffix} file" if suffix else "file without a suffix", count, suffix, kind)
        for suffix, count in ordered[:MAX_SUFFIXES]
    ]
    others = sum(count for _, count in ordered[MAX_SUFFIXES:])
    return sentences + ([_describe("other file", others, "", kind)] if others else [])


def _describe(what: str, count: int, suffix: str, kind: str) -> str:
    verb = "was" if count == 1 else "were"
    plural = what if count == 1 else what.replace("file", "files")
    advice = advice_on(suffix, kind)
    return f"{count} {plural} {verb} not read" + (f": {advice}" if advice else "")


def advice_on(suffix: str, kind: str) -> str:
    """What to do about unread files with a suffix; empty without advice.

    Args:
        suffix: In small letters.
        kind: Kind of the files that are read, "images" or "videos".
    """
    for other in ("images", "videos"):
        if other != kind and suffix in media_suffixes(other):
            return f"`diffnext cache {other}` reads them"
    return next((ADVICE[known] for known in ADVICE if suffix in known.split()), "")


def encoding_of(head: bytes) -> str:
    """The encoding of a text, from the byte order mark that it may begin with; else UTF-8.

    Args:
        head: Its first four bytes.
    """
    marks = (BYTE_ORDER_MARKS[mark] for mark in BYTE_ORDER_MARKS if head.startswith(mark))
    return next(marks, "utf-8")


def reason_of(error: Exception) -> str:
    """The reason of a system error, without the name of the file."""
    return getattr(error, "strerror", None) or str(error)
