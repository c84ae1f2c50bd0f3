"""Where the bytes of a picture, a clip or a side file are."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffnext.data.caching.errors import BadExample
from diffnext.data.plain_files import open_plain
from diffnext.data.record_format import RecordError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split()
)
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .mpg .mpeg .wmv .flv .3gp .ogv".split()
)
SIDE_SUFFIXES = (".json", ".txt", ".cls")
MEDIA_SUFFIXES = {"images": IMAGE_SUFFIXES, "videos": VIDEO_SUFFIXES}


class Media(ABC):
    """Bytes that can be opened."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open for reading, seekable.

        Raises:
            BadExample: If the bytes cannot be had.
        """

    def read(self, limit: int) -> bytes:
        """All bytes.

        Raises:
            BadExample: If they cannot be had, or are more than ``limit``.
        """
        with self.open() as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise BadExample(f"more than {limit} bytes")
        return content


@dataclass(frozen=True)
class FileMedia(Media):
    """A file.

    Attributes:
        path: Its path; links are followed.
    """

    path: str

    def open(self) -> BinaryIO:
        """Open the file, unless it is none: a pipe or a device would block or never end."""
        try:
            return open_plain(self.path, follow_links=True)
        except RecordError as error:
            raise BadExample("is not a regular file") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise BadExample(f"cannot be opened: {_reason(error)}") from error


@dataclass(frozen=True)
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
        """Read the member; nothing is unpacked."""
        with FileMedia(self.archive).open() as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise BadExample(f"the archive is cut off: {len(content)} of {self.size} bytes")
        return io.BytesIO(content)


@dataclass(frozen=True)
class RowMedia(Media):
    """A cell of a table that holds the bytes themselves, or the path of a file.

    Attributes:
        load: Returns the cell: bytes, a path, or a mapping of ``bytes`` and ``path``.
        root: Folder that the path is relative to.
    """

    load: Callable[[], Any]
    root: Path

    def open(self) -> BinaryIO:
        """Read the cell."""
        cell = self.load()
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and cell:
            return FileMedia(os.path.join(self.root, cell)).open()
        if isinstance(cell, bytes) and cell:
            return io.BytesIO(cell)
        raise BadExample("the table has neither bytes nor a path")


def suffix_of(name: str) -> str:
    """The last suffix of a name, in small letters."""
    return os.path.splitext(name)[1].lower()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
