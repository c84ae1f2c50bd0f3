"""Items of WebDataset archives: tar files in which a sample's files share a stem.

Members are read in place. Nothing is unpacked, so no name can lead out of a folder.
"""

from __future__ import annotations

import io
import itertools
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.items import Item
from diffnext.data.caching.media import (
    SIDE_SUFFIXES,
    ArchiveMedia,
    Media,
    is_system_file,
    media_suffixes,
    open_source,
    suffix_of,
)

HEADER_LIMIT = 2**15  # bytes of a header with its extensions
MARK = b"ustar"  # in every header but those of version 7 of Unix, after MARK_OFFSET bytes
MARK_OFFSET = 257
BLOCK = 2**20  # bytes searched at once
PACKED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip",
}


def archive_items(path: str, label: str, kind: str, unread: Counter[str]) -> Iterator[Item]:
    """Items of an archive, in the order of its members, and its damaged parts.

    After a damaged part, and after the end of an archive that others were appended to, reading
    continues at the next header. Of several members of one name the last counts, as it would if
    the archive were unpacked; the others come right after it.

    Args:
        path: Path of the archive.
        label: Begins the names of its items.
        kind: "images" or "videos".
        unread: Counts the members that are not media, by suffix.

    Raises:
        CacheError: If it is not an uncompressed tar file.
    """
    found: dict[str, list[Item]] = {}  # by name
    sides: dict[str, dict[str, Media]] = {}
    with open_source(path) as file:
        for member in _ArchiveReader(path, file).read():
            suffix = suffix_of(member.name)
            if is_system_file(os.path.basename(member.name)):
                continue
            if suffix in media_suffixes(kind) or member.media is None:
                found.setdefault(member.name, []).append(member)
            elif suffix not in SIDE_SUFFIXES:
                unread[suffix] += 1
            elif member.problem is None:
                sides.setdefault(_stem(member.name), {})[suffix] = member.media
    for member in itertools.chain.from_iterable(map(_last_first, found.values())):
        name = f"{label}/{member.name}"
        if member.problem is not None:
            yield Item(name, problem=member.problem)
        else:
            own = sides.get(_stem(member.name)) or sides.get(_key(member.name)) or {}
            yield Item(name, member.media, own)


class _ArchiveReader:
    """Reads an archive member by member.

    Args:
        path: Path of the archive.
        file: The open archive.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._descriptor = file.fileno()
        self._end = os.fstat(self._descriptor).st_size
        self._headers = _HeaderFile(self._descriptor, closefd=False)
        # It begins with an empty archive, because TarFile reads the first header itself.
        self._archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * tarfile.BLOCKSIZE)))
        self._archive.fileobj = self._headers
        self._archive.pax_headers = _Ignored()

    def read(self) -> Iterator[Item]:
        """Members and damaged parts.

        Raises:
            CacheError: If there is no member at all, but other bytes.
            OSError: If it cannot be read any further.
        """
        position = 0
        is_tar = False
        while position < self._end:
            header = self._header_at(position)
            if header is not None:
                is_tar = True
                member, position = self._take(header)
                if member is not None:
                    yield member
                continue
            if position == 0:
                self._check_not_packed()
            start, position = position, self._find_header(position + 1, self._end)
            if not self._is_blank(start, position):
                if position == self._end and not is_tar:
                    raise CacheError(f"{self._path} is not a readable uncompressed tar file")
                problem = f"the archive is damaged: {position - start} bytes hold no member"
                yield Item(f"(byte {start})", problem=problem)

    def _header_at(self, position: int) -> tarfile.TarInfo | None:
        """The member whose header begins at a position, or None."""
        self._headers.start_at(position)
        try:
            return tarfile.TarInfo.fromtarfile(self._archive)
        except OSError:
            raise
        except Exception:  # tarfile raises errors of any type on damaged headers
            return None

    def _take(self, header: tarfile.TarInfo) -> tuple[Item | None, int]:
        """A member, unless it is a folder, and where the next header is."""
        start, stop = header.offset_data, self._archive.offset
        size = min(header.size, stop - start)  # of a folder or device none, of a sparse file less
        is_whole = 0 <= size <= self._end - start
        if not is_whole or not self._is_header_or_end(stop):
            found = self._find_header(start, stop + tarfile.BLOCKSIZE if is_whole else self._end)
            if not is_whole or found < stop:
                held = found - start
                problem = f"the archive is damaged or cut off: {held} of {header.size} bytes"
                return Item(header.name, problem=problem), found
        if header.isdir():
            return None, stop
        content = ArchiveMedia(self._path, start, header.size)
        return Item(header.name, content, problem=find_problem(header)), stop

    def _is_header_or_end(self, position: int) -> bool:
        """Whether a header, zeros or the end of the file follow."""
        block = self._read(position, tarfile.BLOCKSIZE)
        is_marked = block[MARK_OFFSET:].startswith(MARK)
        return is_marked or not block.strip(b"\0") or self._header_at(position) is not None

    def _find_header(self, start: int, stop: int) -> int:
        """Where the next header begins; ``stop`` if there is none before."""
        position = start + MARK_OFFSET
        while block := self._read(position, min(BLOCK, stop - position)):
            found = block.find(MARK)
            while found >= 0:
                header = position + found - MARK_OFFSET
                if self._header_at(header) is not None:
                    return header
                found = block.find(MARK, found + 1)
            position += max(len(block) - len(MARK) + 1, 1)
        return stop

    def _is_blank(self, start: int, stop: int) -> bool:
        """Whether there are only zeros, as at the end of an archive."""
        places = range(start, stop, BLOCK)
        return not any(self._read(at, min(BLOCK, stop - at)).strip(b"\0") for at in places)

    def _read(self, start: int, size: int) -> bytes:
        return os.pread(self._descriptor, max(size, 0), start)

    def _check_not_packed(self) -> None:
        head = self._read(0, max(map(len, PACKED)))
        for magic, tool in PACKED.items():
            if head.startswith(magic):
                raise CacheError(
                    f"{self._path} is not a readable uncompressed tar file: `{tool}` it first"
                )


class _Ignored(dict[str, str]):
    """A header's values for all members, which could rename each or change its size."""

    def __setitem__(self, key: str, value: str) -> None:
        pass


class _HeaderFile(io.FileIO):
    """An archive for tarfile to read, one header at a time.

    A header may claim any length, and tarfile would read that much, or for ever at the end of the
    file; here it gets at most ``HEADER_LIMIT`` bytes.
    """

    _left = 0

    def start_at(self, position: int) -> None:
        """Go to a header."""
        self.seek(position)
        self._left = HEADER_LIMIT

    def read(self, size: int | None = -1) -> bytes:
        """Read a part of the header.

        Raises:
            tarfile.ReadError: If it is too long.
        """
        if size is None or not 0 <= size <= self._left:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self._left -= size
        return super().read(size) or b""


def find_problem(member: tarfile.TarInfo) -> str | None:
    """Why a member is not used; None if it is fine."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of the archive"
    if member.issym() or member.islnk():
        return "is a link"
    if not member.isreg() or member.issparse():
        return "is not a regular file"
    return None


def _last_first(members: list[Item]) -> list[Item]:
    """Members of one name; those with a problem come last, as they would replace no other."""
    sound = [member for member in members if member.problem is None]
    others = [member for member in members if member.problem is not None]
    return [*reversed(sound), *reversed(others)]


def _stem(name: str) -> str:
    """The name without its suffix, and without "./" in front."""
    return os.path.splitext(posixpath.normpath(name))[0]


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot after the last slash."""
    folder, base = posixpath.split(posixpath.normpath(name))
    return posixpath.join(folder, base.partition(".")[0])
