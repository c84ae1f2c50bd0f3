"""What there is to cache: the items of a folder, a glob pattern, tables or archives."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from diffnext.data.caching.archives import archive_items
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.items import Item, printable, side_files
from diffnext.data.caching.media import MEDIA_SUFFIXES, FileMedia, suffix_of
from diffnext.data.caching.settings import CacheSettings
from diffnext.data.caching.tables import huggingface_items, table_items

TABLE_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
FOLDER_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
HUGGINGFACE_FILES = ("dataset_dict.json", "dataset_info.json")
GLOB_CHARACTERS = "*?["


def list_items(settings: CacheSettings) -> list[Item]:
    """All items of a source, always in the same order.

    ``settings.source`` is

    - a folder of media files, at any depth, with captions in files beside them;
    - a glob pattern (``**`` stands for folders at any depth) or one such file;
    - a table: CSV, TSV, JSON lines or Parquet, or several by a glob pattern;
    - a folder with a table ``metadata.csv``, ``.jsonl`` or ``.parquet`` (an imagefolder);
    - a folder of ``datasets.save_to_disk``;
    - uncompressed tar files as WebDataset has them: one, a folder of them, or a glob pattern.

    Raises:
        CacheError: If there is no such source, it cannot be read, or it holds no item.
    """
    source_format = settings.format if settings.format != "auto" else guess_format(settings)
    if source_format == "media":
        items = media_items(settings)
    elif source_format == "tar":
        items = archive_items(find_files(settings.source, (".tar",)), settings.kind)
    elif source_format == "huggingface":
        items = huggingface_items(settings)
    else:
        items = table_items(_table_files(settings, source_format), source_format, settings)
    found = list(_mark_repeated(items))
    if not found:
        raise CacheError(f"{settings.source} holds no {settings.kind}")
    return found


def guess_format(settings: CacheSettings) -> str:
    """The kind of a source, from its name and content.

    Raises:
        CacheError: If there is none of that name.
    """
    source = Path(settings.source)
    if not source.is_dir():
        suffixes = {suffix_of(path) for path in find_files(settings.source)}
        if suffixes == {".tar"}:
            return "tar"
        kinds = {TABLE_SUFFIXES.get(suffix, "media") for suffix in suffixes}
        return kinds.pop() if len(kinds) == 1 else "media"
    if any((source / name).is_file() for name in HUGGINGFACE_FILES):
        return "huggingface"
    for table in _folder_tables(settings):
        return TABLE_SUFFIXES[table.suffix]
    names = os.listdir(source)
    is_media = any(suffix_of(name) in MEDIA_SUFFIXES[settings.kind] for name in names)
    return "tar" if not is_media and any(suffix_of(n) == ".tar" for n in names) else "media"


def find_files(source: str, suffixes: Iterable[str] = ()) -> list[str]:
    """The files that a path or a glob pattern names.

    Args:
        source: File, folder or pattern.
        suffixes: Of the files of a folder.

    Raises:
        CacheError: If there are none.
    """
    if os.path.isdir(source):
        names = sorted(os.listdir(source))
        found = [os.path.join(source, name) for name in names if suffix_of(name) in suffixes]
    elif os.path.exists(source):
        found = [source]
    elif any(character in source for character in GLOB_CHARACTERS):
        found = sorted(path for path in glob.glob(source, recursive=True))
    else:
        found = []
    if not found:
        raise CacheError(f"there is nothing at {source}")
    return found


def hash_items(items: Iterable[Item]) -> str:
    """Tell one list of items from another: SHA-256 of names and values."""
    digest = hashlib.sha256()
    for item in items:
        line = json.dumps([item.name, dict(item.values), item.problem], default=repr)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def media_items(settings: CacheSettings) -> Iterator[Item]:
    """Media files of a folder or a pattern, with the side files beside each."""
    suffixes = MEDIA_SUFFIXES[settings.kind]
    source = settings.source
    if os.path.isdir(source):
        yield from _folder_items(source, suffixes)
        return
    for path in find_files(source):
        if os.path.isdir(path):
            continue
        if suffix_of(path) in suffixes or path == source:
            yield Item(path, FileMedia(path), side_files(path, os.path.exists))


def _folder_items(folder: str, suffixes: frozenset[str]) -> Iterator[Item]:
    """Walk a folder, also through links; each real folder once, so that loops of links end."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        known = {os.path.join(place, name) for name in names}
        for name in sorted(names):
            if suffix_of(name) not in suffixes:
                continue
            path = os.path.join(place, name)
            relative = os.path.relpath(path, folder)
            yield Item(relative, FileMedia(path), side_files(path, known.__contains__))


def _folder_tables(settings: CacheSettings) -> list[Path]:
    """Tables that describe the files of a folder."""
    folder = Path(settings.source) / (settings.split or "")
    return [folder / name for name in FOLDER_TABLES if (folder / name).is_file()]


def _table_files(settings: CacheSettings, source_format: str) -> list[str]:
    if os.path.isdir(settings.source):
        tables = [str(path) for path in _folder_tables(settings)]
        if tables:
            return tables[:1]
    suffixes = [suffix for suffix, name in TABLE_SUFFIXES.items() if name == source_format]
    return find_files(settings.source, suffixes)


def _mark_repeated(items: Iterable[Item]) -> Iterator[Item]:
    """Give all but the first item of one name a problem, and a name of its own."""
    counts: dict[str, int] = {}
    for item in items:
        name = printable(item.name)
        count = counts[name] = counts.get(name, 0) + 1
        if count == 1:
            yield replace(item, name=name)
        else:
            problem = "the same name as an item before it"
            yield replace(item, name=f"{name} ({count})", media=None, problem=problem)
