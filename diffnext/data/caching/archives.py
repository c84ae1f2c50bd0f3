"""Items of WebDataset archives: tar files in which a sample's files share a stem.

Members are read where they lie. Nothing is unpacked, so no name can lead out of a folder.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.items import Item
from diffnext.data.caching.media import (
    MEDIA_SUFFIXES,
    SIDE_SUFFIXES,
    ArchiveMedia,
    Media,
    suffix_of,
)


def archive_items(paths: list[str], kind: str) -> Iterator[Item]:
    """Items of several archives, in the order of their names and members.

    Raises:
        CacheError: If one of them is not an uncompressed tar file.
    """
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    for path in paths:
        yield from _one_archive(path, os.path.relpath(path, common or "."), kind)


def _one_archive(path: str, label: str, kind: str) -> Iterator[Item]:
    """Items of one archive; a member that is not a plain file inside it has a problem."""
    media: list[tarfile.TarInfo] = []
    sides: dict[str, dict[str, Media]] = {}
    cut_off = None
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                for member in archive:
                    _sort_in(path, member, kind, media, sides)
            except tarfile.TarError as error:
                cut_off = str(error)
    except (OSError, tarfile.TarError) as error:
        raise CacheError(f"{path} is not a readable uncompressed tar file: {error}") from error
    for member in media:
        name = f"{label}/{member.name}"
        problem = find_problem(member)
        if problem is None:
            own = sides.get(_stem(member.name)) or sides.get(_key(member.name)) or {}
            content = ArchiveMedia(path, member.offset_data, member.size)
            yield Item(name, content, own)
        else:
            yield Item(name, problem=problem)
    if cut_off is not None:
        yield Item(f"{label} (end)", problem=f"the archive is damaged: {cut_off}")


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


def _sort_in(
    path: str,
    member: tarfile.TarInfo,
    kind: str,
    media: list[tarfile.TarInfo],
    sides: dict[str, dict[str, Media]],
) -> None:
    suffix = suffix_of(member.name)
    if member.isdir():
        return
    if suffix in MEDIA_SUFFIXES[kind]:
        media.append(member)
    elif suffix in SIDE_SUFFIXES and find_problem(member) is None:
        content = ArchiveMedia(path, member.offset_data, member.size)
        sides.setdefault(_stem(member.name), {}).setdefault(suffix, content)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot behind the last slash."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
