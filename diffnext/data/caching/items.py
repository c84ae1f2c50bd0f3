"""The pictures and videos of a source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffnext.data.caching.media import SIDE_SUFFIXES, Media, SideFiles

_NOTHING: Mapping[str, Any] = {}  # one for all: a source may have a million items


def _nothing() -> Mapping[str, Any]:
    return _NOTHING


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or video of the source.

    Attributes:
        name: A name that no other item of the source has; stored with its examples.
        media: Where its bytes are; None if there is a problem.
        sides: Side files by suffix.
        values: Caption, text, label and flow, if a table has them.
        problem: Why it cannot be used, if that is known before it is read.
    """

    name: str
    media: Media | None = None
    sides: Mapping[str, Media] = field(default_factory=_nothing)
    values: Mapping[str, Any] = field(default_factory=_nothing)
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    """The contents of a source.

    Attributes:
        items: Its pictures or videos, always in the same order.
        unread: Number of files that are not read, by suffix.
    """

    items: list[Item]
    unread: dict[str, int] = field(default_factory=dict)


class SideFinder:
    """Finds side files with one listing per folder."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, tuple[str, ...]]] = {}

    def find(self, path: str) -> Mapping[str, Media]:
        """The side files of a file, by suffix."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            try:
                names = os.listdir(folder or ".")
            except (OSError, ValueError):  # ValueError: a NUL byte in the name
                names = []
            self._folders[folder] = side_suffixes(names)
        return side_files(path, self._folders[folder].get(os.path.splitext(name)[0]))


def side_suffixes(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Suffixes of the side files of a folder, as they are written, by the rest of the name.

    If two differ only in capital letters, the one in small letters comes first, and counts.
    """
    found: dict[str, tuple[str, ...]] = {}
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    sides = [name for name in names if name.lower().endswith(SIDE_SUFFIXES)]
    for name in sorted(sides, reverse=True):
        stem, suffix = os.path.splitext(name)
        suffixes = (*found.get(stem, ()), suffix)
        found[stem] = shared.setdefault(suffixes, suffixes)
    return found


def side_files(path: str, suffixes: tuple[str, ...] | None) -> Mapping[str, Media]:
    """Side files of a file with the given suffixes."""
    return SideFiles(path, suffixes) if suffixes else _NOTHING
