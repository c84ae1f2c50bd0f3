"""The pictures and videos of a source."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffnext.data.caching.media import SIDE_SUFFIXES, FileMedia, Media


@dataclass(frozen=True)
class Item:
    """One picture or video of the source.

    Attributes:
        name: Tells it from all others of the source; stored with its examples.
        media: Where its bytes are; None if there is a problem.
        sides: Side files by suffix.
        values: Caption, text, label and flow as far as a table has them.
        problem: Why it cannot be used, as far as that is known before it is read.
    """

    name: str
    media: Media | None = None
    sides: Mapping[str, Media] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def side_files(path: str, exists: Callable[[str], bool]) -> dict[str, Media]:
    """Side files of a media file: the same name with another suffix."""
    stem = os.path.splitext(path)[0]
    return {end: FileMedia(stem + end) for end in SIDE_SUFFIXES if exists(stem + end)}


def printable(name: str) -> str:
    """A name that can be written as UTF-8; names of files need not be."""
    return name.encode("utf-8", "backslashreplace").decode()
