"""The items of a source: a folder, a glob pattern, tables or archives."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffnext.data.caching.archives import archive_items
from diffnext.data.caching.arrow_tables import read_parquet, read_saved_dataset
from diffnext.data.caching.errors import CacheError, printable
from diffnext.data.caching.items import (
    Item,
    Listing,
    SideFinder,
    side_files,
    side_suffixes,
)
from diffnext.data.caching.media import (
    SIDE_SUFFIXES,
    TABLE_SUFFIXES,
    FileMedia,
    advice_on,
    describe_unread,
    is_system_file,
    media_suffixes,
    reason_of,
    suffix_of,
)
from diffnext.data.caching.settings import CacheSettings
from diffnext.data.caching.tables import folder_of, read_csv, read_jsonl, row_items
from diffnext.utils.messages import did_you_mean

FOLDER_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
HUGGINGFACE_FILES = ("dataset_dict.json", "dataset_info.json")
GLOB_CHARACTERS = "*?["
ANY_DEPTH = "**"
READERS = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}


@dataclass
class _Found:
    """Other files of a source than its items.

    Attributes:
        unread: Number of files that are not media, by suffix.
        table: The first table beside or below the media.
        json: The first file of JSON.
    """

    unread: Counter[str] = field(default_factory=Counter)
    table: str | None = None
    json: str | None = None


def list_items(settings: CacheSettings) -> Listing:
    """All items of a source, always in the same order.

    ``settings.source`` is

    - a folder of media files, at any depth, with captions in files beside them;
    - a glob pattern (``**`` means folders at any depth) or one such file;
    - a table: CSV, TSV, JSON lines or Parquet, or several by a glob pattern;
    - a folder with a table ``metadata.csv``, ``.jsonl`` or ``.parquet`` (an imagefolder);
    - a folder of ``datasets.save_to_disk``;
    - uncompressed tar files as WebDataset has them: one, a folder of them, or a glob pattern.

    Raises:
        CacheError: If there is no such source, it cannot be read, or it holds no item.
    """
    found = _Found()
    try:
        items = list(_mark_repeated(_read_source(settings, found)))
    except OSError as error:
        raise CacheError(f"{settings.source} cannot be read: {reason_of(error)}") from error
    if not items:
        raise CacheError(_explain_nothing(settings, found))
    if all(item.media is None for item in items):
        first = f"{items[0].name}: {items[0].problem}"
        raise CacheError(f"{settings.source} holds no {settings.kind} that can be used; {first}")
    return Listing(items, dict(found.unread))


def _read_source(settings: CacheSettings, found: _Found) -> Iterable[Item]:
    paths = None if os.path.isdir(settings.source) else find_files(settings.source)
    source_format = settings.format if settings.format != "auto" else guess_format(settings, paths)
    if source_format == "huggingface":
        rows = read_saved_dataset(settings)
        label = os.path.basename(os.path.normpath(settings.source))
        return _row_items(row_items(label, rows, settings, settings.source), settings)
    if source_format == "media":
        return _media_items(paths, settings, found)
    if source_format == "tar":
        archives = paths or _files_in(settings.source, (".tar",), found)
        return _archive_items(archives, settings, found)
    tables = paths or _tables_in(settings, source_format, found)
    return _row_items(_table_items(tables, source_format, settings), settings)


def guess_format(settings: CacheSettings, paths: list[str] | None) -> str:
    """The format of a source, from its name and content.

    Args:
        settings: Settings of the build.
        paths: Files of the source; None if it is a folder.
    """
    source = Path(settings.source)
    suffixes = media_suffixes(settings.kind)
    if paths is not None:
        kinds = {_format_of(path) for path in paths}
        return kinds.pop() if len(kinds) == 1 else "media"
    if any((source / name).is_file() for name in HUGGINGFACE_FILES):
        return "huggingface"
    for table in _folder_tables(settings):
        return TABLE_SUFFIXES[table.suffix]
    names = os.listdir(source)
    is_media = any(suffix_of(name) in suffixes for name in names)
    return "tar" if not is_media and any(suffix_of(n) == ".tar" for n in names) else "media"


def _format_of(path: str) -> str:
    suffix = suffix_of(path)
    if suffix == ".tar":
        return "tar"
    # Beside media files .json are side files.
    return "jsonl" if suffix == ".json" else TABLE_SUFFIXES.get(suffix, "media")


def find_files(source: str) -> list[str]:
    """The files that a path or a glob pattern names.

    Raises:
        CacheError: If there are none.
    """
    if os.path.exists(source):
        return [source]
    if not any(character in source for character in GLOB_CHARACTERS):
        raise CacheError(f"there is no folder or file {source}{did_you_mean(Path(source))}")
    found = sorted(_expand(source))
    if not found:
        raise CacheError(f"there is nothing at {source}")
    return found


def _expand(pattern: str) -> set[str]:
    """The files that a glob pattern names; unlike in ``glob``, loops of links end."""
    parts = pattern.split(os.sep)
    if ANY_DEPTH not in parts:
        return set(glob.glob(pattern))
    at = parts.index(ANY_DEPTH)
    head, tail = os.sep.join(parts[:at]) or os.sep, os.sep.join(parts[at + 1 :]) or "*"
    found = set()
    for root in glob.glob(os.path.join(head, "")) if at > 0 else [""]:
        for place, _ in _walk(root or os.curdir):
            inner = Path(place).relative_to(root or os.curdir).parts
            if not any(part.startswith(".") for part in inner):
                found |= _expand(os.path.join(glob.escape(os.path.join(root, *inner)), tail))
    return found


def _walk(
    folder: str, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those in it, also through links; each real folder once, so that loops end.

    Yields:
        The path of each, and the sorted names of its files.
    """
    visited = set()
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield place, sorted(names)


def _media_items(paths: list[str] | None, settings: CacheSettings, found: _Found) -> list[Item]:
    """Media files with the side files beside each.

    Args:
        paths: Files of the source; None if it is a folder.
        settings: Settings of the build.
        found: Collects other files.

    Raises:
        CacheError: If none has a side file, but there is a table.
    """
    if paths is None:
        items = list(_folder_items(settings, found))
    else:
        items = list(_file_items(paths, settings, found))
    table = found.table or found.json or (paths is None and _table_beside(settings.source))
    if table:
        advice = advice_on(".csv", settings.kind)
        problem = f"no file of {settings.source} has a caption beside it, but there is {table}"
        _check_captions(items, settings, f"{problem}: {advice}")
    return items


def _row_items(rows: Iterator[Item], settings: CacheSettings) -> list[Item]:
    """Items of tables.

    Raises:
        CacheError: If none has a caption, or the label that is wanted.
    """
    items = list(rows)
    wanted = "label" if settings.labels else "caption"
    problem = f"no row of {settings.source} has a {wanted}"
    _check_captions(items, settings, f"{problem}: --{wanted}-column names its column")
    return items


def _check_captions(items: list[Item], settings: CacheSettings, message: str) -> None:
    wanted = {"label"} if settings.labels else {"caption", "text"}
    usable = [item for item in items if item.media is not None]
    has_any = any(item.sides or item.values.keys() & wanted for item in usable)
    if usable and not has_any and not settings.empty_captions:
        raise CacheError(message)


def _table_beside(source: str) -> str | None:
    """A table in the folder that the source is in."""
    folder = glob.escape(os.path.dirname(os.path.abspath(source)))
    paths = sorted(glob.glob(os.path.join(folder, "*")))
    return next((path for path in paths if suffix_of(path) in TABLE_SUFFIXES), None)


def _folder_items(settings: CacheSettings, found: _Found) -> Iterator[Item]:
    """Media files of a folder, with the side files beside each."""
    suffixes = media_suffixes(settings.kind)
    errors: list[OSError] = []
    for place, names in _walk(settings.source, errors.append):
        inner = Path(place).relative_to(settings.source).parts
        sides = side_suffixes(names)
        for name in names:
            if _is_media(place, name, suffixes, found):
                path = os.path.join(place, name)
                own = sides.get(os.path.splitext(name)[0])
                yield Item(os.path.join(*inner, name), FileMedia(path), side_files(path, own))
    for error in errors:
        name = os.path.relpath(error.filename, settings.source)
        yield Item(name, problem=f"the folder cannot be read: {reason_of(error)}")


def _file_items(paths: list[str], settings: CacheSettings, found: _Found) -> Iterator[Item]:
    """Media files among those of a pattern, or one file, with the side files beside each."""
    suffixes = media_suffixes(settings.kind)
    sides = SideFinder()
    for path in paths:
        if os.path.isdir(path):
            continue
        advice = advice_on(suffix_of(path), settings.kind)
        if path == settings.source and advice:
            raise CacheError(f"{path} is not a kind of source that is read: {advice}")
        folder, name = os.path.split(path)
        if _is_media(folder, name, suffixes, found) or path == settings.source:
            yield Item(path, FileMedia(path), sides.find(path))


def _is_media(folder: str, name: str, suffixes: frozenset[str], found: _Found) -> bool:
    """Whether a file is media; otherwise it is counted in ``found``."""
    suffix = suffix_of(name)
    if is_system_file(name):
        return False
    if suffix in suffixes:
        return True
    if suffix in TABLE_SUFFIXES and found.table is None:
        found.table = os.path.join(folder, name)
    if suffix == ".json" and found.json is None:
        found.json = os.path.join(folder, name)
    if suffix not in SIDE_SUFFIXES:
        found.unread[suffix] += 1
    return False


def _archive_items(paths: list[str], settings: CacheSettings, found: _Found) -> Iterator[Item]:
    """Items of several archives."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    labels = {path: os.path.relpath(path, common or os.curdir) for path in paths}
    return _read_each(
        labels,
        lambda path: archive_items(path, labels[path], settings.kind, found.unread),
    )


def _table_items(paths: list[str], source_format: str, settings: CacheSettings) -> Iterator[Item]:
    """Items of several tables; if two have one name, their folders are added to it."""
    labels = {path: os.path.basename(path) for path in paths}
    if len(set(labels.values())) < len(paths):
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        labels = {path: os.path.relpath(path, common or os.curdir) for path in paths}
    read = READERS[source_format]
    return _read_each(
        labels,
        lambda path: row_items(
            labels[path], read(path, settings), settings, folder_of(path, settings)
        ),
    )


def _read_each(labels: dict[str, str], read: Callable[[str], Iterator[Item]]) -> Iterator[Item]:
    """Items of several files; a file that cannot be read becomes an item with a problem."""
    for path, label in labels.items():
        try:
            yield from read(path)
        except CacheError as error:
            if len(labels) == 1:
                raise
            yield Item(label, problem=str(error))


def _folder_tables(settings: CacheSettings) -> list[Path]:
    """Tables that describe the files of a folder."""
    folder = Path(settings.source) / (settings.split or "")
    return [folder / name for name in FOLDER_TABLES if (folder / name).is_file()]


def _tables_in(settings: CacheSettings, source_format: str, found: _Found) -> list[str]:
    """Tables of a folder: the one that describes it, or all of a format."""
    if tables := _folder_tables(settings):
        return [str(tables[0])]
    suffixes = [suffix for suffix, name in TABLE_SUFFIXES.items() if name == source_format]
    return _files_in(settings.source, suffixes, found)


def _files_in(folder: str, suffixes: Iterable[str], found: _Found) -> list[str]:
    wanted = frozenset(suffixes)
    names = [n for n in sorted(os.listdir(folder)) if _is_media(folder, n, wanted, found)]
    if not names:
        raise CacheError(f"there is nothing at {os.path.join(folder, '*')}{' or *'.join(suffixes)}")
    return [os.path.join(folder, name) for name in names]


def _explain_nothing(settings: CacheSettings, found: _Found) -> str:
    """Why a source has no item."""
    unread = describe_unread(found.unread, settings.kind)
    if found.table is not None:
        unread.insert(0, f"there is the table {found.table}")
    return "; ".join([f"{settings.source} holds no {settings.kind}", *unread])


def _mark_repeated(items: Iterable[Item]) -> Iterator[Item]:
    """Give all but the first item of one name a problem, and a name of its own."""
    seen: set[str] = set()
    repeated: Counter[str] = Counter()
    for item in items:
        name = printable(item.name)
        if name in seen:
            repeated[name] += 1
            problem = "the same name as an item before it"
            yield replace(item, name=f"{name} ({repeated[name] + 1})", media=None, problem=problem)
        else:
            seen.add(name)
            yield item if name == item.name else replace(item, name=name)
