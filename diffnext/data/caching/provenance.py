"""Where records come from: a line for each item of the source, to notice changes.

``sources.jsonl`` lies beside the manifest::

    {"source": "cat.jpg", "stamp": [...], "hash": "9f...", "examples": {"512x512": 1}}

While its stamp (sizes and times of its files, and its values in a table) is the same, an item
counts as unchanged. If the stamp differs, the hash decides.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError

from diffnext.data.caching.errors import BadExample, Skipped
from diffnext.data.caching.items import Item
from diffnext.data.caching.media import Media
from diffnext.data.plain_files import open_plain
from diffnext.data.record_format import RecordError
from diffnext.data.records import RecordDataset
from diffnext.utils.json_files import write_lines

SOURCES_NAME = "sources.jsonl"
BLOCK = 2**20  # bytes hashed at once
MAX_NAMES = 3  # in a message


@dataclass
class ItemFacts:
    """Facts about an item that was read.

    Attributes:
        source: Its name.
        stamp: See :func:`stamp_item`.
        hash: See :func:`hash_item`; empty if it could not be read.
        examples: Number of examples by size.
        skipped: What was left out, and why.
        notes: What was assumed about it.
    """

    source: str
    stamp: list[Any] = field(default_factory=list)
    hash: str = ""
    examples: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: Sequence[str] = ()


_FACTS = TypeAdapter(ItemFacts)


def write_facts(path: Path, facts: Iterable[ItemFacts]) -> None:
    """Write a ``sources.jsonl``."""
    lines = (_FACTS.dump_python(item, mode="json", exclude_defaults=True) for item in facts)
    write_lines(path, lines)


def read_facts(path: Path) -> Iterator[ItemFacts]:
    """Read a ``sources.jsonl``, line by line.

    Raises:
        RecordError: If it is damaged, or a link.
        FileNotFoundError: If there is none.
    """
    with open_plain(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield _FACTS.validate_json(line)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise RecordError(f"{path}, line {number}: {reason}") from None


def stamp_item(item: Item) -> list[Any]:
    """Shows quickly whether an item is the same: table values, sizes and times of files."""
    media = item.media.stamp() if item.media is not None else []
    sides = {suffix: side.stamp() for suffix, side in sorted(item.sides.items())}
    return [xxhash.xxh3_64_hexdigest(_describe_values(item)), media, sides]


def hash_item(item: Item, most: float = math.inf) -> str:
    """XXH3 (128 bits) of everything the examples of an item are made of, in hexadecimal digits.

    Args:
        item: The item.
        most: Bytes that a file of it may have.

    Raises:
        BadExample: If its files cannot be read, or one is larger.
        OSError: If reading fails.
    """
    digest = xxhash.xxh3_128(_describe_values(item))
    for suffix, side in sorted(item.sides.items()):
        digest.update(suffix.encode())
        _hash_media(digest, side, most)
    if item.media is not None:
        _hash_media(digest, item.media, most)
    return digest.hexdigest()


def _describe_values(item: Item) -> bytes:
    return json.dumps([dict(item.values), item.problem], default=repr, sort_keys=True).encode()


def _hash_media(digest: xxhash.xxh3_128, media: Media, most: float) -> None:
    length = 0
    with media.open() as file:
        while block := file.read(BLOCK):
            length += len(block)
            if length > most:
                raise BadExample(f"has more than {most} bytes")
            digest.update(block)
    digest.update(length.to_bytes(8, "little"))


@dataclass(frozen=True)
class Changes:
    """Changes of a source since it was read.

    Attributes:
        changed: Items with other content.
        added: New items.
        removed: Items that are gone.
        is_reordered: Whether the items that stayed are in another order.
    """

    changed: Sequence[str] = ()
    added: Sequence[str] = ()
    removed: Sequence[str] = ()
    is_reordered: bool = False

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.removed or self.is_reordered)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:MAX_NAMES])}"
            f"{', ...' if len(names) > MAX_NAMES else ''})"
            for what in ("changed", "added", "removed")
            if (names := getattr(self, what))
        ]
        if self.is_reordered:
            parts.append("the order changed")
        return ", ".join(parts)


def find_changes(
    begun: Sequence[str], facts: Iterable[ItemFacts], items: Sequence[Item]
) -> Changes:
    """Compare a source with an earlier reading of it.

    Args:
        begun: Names of the items, in order, when the build began.
        facts: Facts about the items that were read.
        items: Items of the source now.
    """
    known = {item.source: item for item in facts}
    names = [item.name for item in items]
    before, now = set(begun), set(names)
    changed = [
        item.name for item in items if item.name in known and not is_same(known[item.name], item)
    ]
    added = [name for name in names if name not in before]
    removed = [name for name in begun if name not in now]
    is_reordered = [n for n in names if n in before] != [n for n in begun if n in now]
    return Changes(changed, added, removed, is_reordered)


def is_same(facts: ItemFacts, item: Item) -> bool:
    """Whether an item is unchanged since it was read."""
    if stamp_item(item) == facts.stamp:
        return True
    try:
        return bool(facts.hash) and hash_item(item) == facts.hash
    except (BadExample, OSError):
        return False


class PreviousRecords:
    """Records of a build that is being updated; sound ones of unchanged items are copied.

    Args:
        parts: Folders with ``sources.jsonl`` and a dataset for each size.
    """

    def __init__(self, parts: Iterable[Path]) -> None:
        self._by_name: dict[str, _Place] = {}
        self._by_hash: dict[str, _Place] = {}
        self._open = functools.lru_cache(maxsize=16)(open_records)  # one for each size
        for part in parts:
            first: dict[str, int] = {}
            for facts in readable_facts(part / SOURCES_NAME):
                if facts.examples:
                    place = _Place(part, facts, dict(first))
                    self._by_name[facts.source] = self._by_hash[facts.hash] = place
                for size, count in facts.examples.items():
                    first[size] = first.get(size, 0) + count

    def find(self, item: Item) -> ItemFacts | None:
        """The facts about an item whose records can be copied; None if it must be read again.

        The item may have another name with the same content, as a row that moved in its table.
        """
        if not self._by_name:
            return None
        stamp = stamp_item(item)
        place = self._by_name.get(item.name)
        if place is None or place.facts.stamp != stamp:
            try:
                place = self._by_hash.get(hash_item(item))
            except (BadExample, OSError):
                return None
        if place is None:
            return None
        facts = replace(place.facts, source=item.name, stamp=stamp)
        try:
            for _ in self.read(facts):
                pass
        except RecordError:
            return None
        return facts

    def read(self, facts: ItemFacts) -> Iterator[tuple[str, dict[str, Any]]]:
        """The records of an item that :meth:`find` found, with the size of each."""
        place = self._by_hash[facts.hash]
        for size, count in place.facts.examples.items():
            dataset = self._open(place.part / size)
            if dataset is None:
                raise RecordError(f"{place.part / size} is damaged")
            for index in range(place.first.get(size, 0), place.first.get(size, 0) + count):
                record = dataset[index]
                ending = record["source"][len(place.facts.source) :]
                yield size, {**record, "source": facts.source + ending}


def readable_facts(path: Path) -> list[ItemFacts]:
    """What a ``sources.jsonl`` says; nothing if it is damaged."""
    try:
        return list(read_facts(path))
    except RecordError:
        return []


def open_records(folder: Path) -> RecordDataset | None:
    """A dataset; None if it is damaged."""
    try:
        return RecordDataset(folder)
    except (RecordError, OSError):
        return None


@dataclass(frozen=True)
class _Place:
    """Where the records of an item are: those of each size follow each other from ``first`` on."""

    part: Path
    facts: ItemFacts
    first: Mapping[str, int]
