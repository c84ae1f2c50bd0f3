"""Items of tables: what columns mean, rows, and tables of text (CSV and JSON lines)."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from xxhash import xxh3_128_intdigest

from diffnext.data.caching.captions import VALUE_NAMES, clean_text
from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.items import Item, SideFinder
from diffnext.data.caching.media import (
    FileMedia,
    Media,
    encoding_of,
    media_suffixes,
    open_source,
    suffix_of,
)
from diffnext.data.caching.settings import CacheSettings

MEDIA = "media"  # our name of the column of the files
MEDIA_NAMES = {
    "images": "file_name file filename path image image_path jpg png".split(),
    "videos": "file_name file filename path video video_path mp4 clip".split(),
}
MAX_LINE = 2**24  # characters
DELIMITERS = (",", "\t", ";", "|")
BAD_QUOTES = "has a quotation mark that is not closed, or one too many"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        name: Its number, from 1, or the numbers of several unreadable rows.
        values: Its caption, text, label and flow, as far as the table has them.
        file: The path in its column of files, or where to read the cell.
        problem: Why it cannot be read.
    """

    name: int | str
    values: Mapping[str, Any]
    file: Any = None
    problem: str | None = None


class CellError(Exception):
    """A cell that cannot be read; it takes the place of the value."""


def choose_columns(names: Collection[str], settings: CacheSettings) -> dict[str, str]:
    """The columns of files, captions, texts, labels and flows that a table has."""
    candidates = {MEDIA: MEDIA_NAMES[settings.kind]} | {name: [name] for name in VALUE_NAMES}
    found = {}
    for name, usual in candidates.items():
        asked = getattr(settings.columns, name)
        chosen = next((n for n in ([asked] if asked else usual) if n in names), None)
        if chosen is not None:
            found[name] = chosen
    return found


def check_columns(names: Sequence[str], settings: CacheSettings, table: str) -> dict[str, str]:
    """The columns of a table, see :func:`choose_columns`.

    Raises:
        CacheError: If there is none with files, or none of a name that was asked for, or two.
    """
    found = choose_columns(names, settings)
    for name in (MEDIA, *VALUE_NAMES):
        asked = getattr(settings.columns, name)
        if name not in found and (asked or name == MEDIA):
            missing = [asked] if asked else MEDIA_NAMES[settings.kind]
            listed = ", ".join(names)
            if any(suffix_of(column) in media_suffixes(settings.kind) for column in names):
                listed += ": the first row must name the columns"
            elif not asked:
                listed += "; --media-column names another"
            raise CacheError(
                f"{table} has no column {' or '.join(map(repr, missing))}; it has {listed}"
            )
    for column in found.values():
        if list(names).count(column) > 1:
            raise CacheError(f"{table} has more than one column {column!r}")
    return found


def row_items(
    label: str, rows: Iterable[Row], settings: CacheSettings, root: str
) -> Iterator[Item]:
    """Items of rows.

    Args:
        label: Name of the table.
        rows: Rows of the table.
        settings: Settings of the build.
        root: Folder that paths are relative to.
    """
    sides = SideFinder()
    first_rows: dict[int, int | str] = {}
    for row in rows:
        path = row.file if isinstance(row.file, str) and row.file else None
        name = f"{label}:{row.name}" + (f" {path}" if path else "")
        problem = row.problem or _find_problem(row.values, settings)
        if problem is None and path is not None:
            problem = _find_repeat(path, row, first_rows)
        if problem is not None:
            yield Item(name, problem=problem)
        elif path is not None:
            file = os.path.join(root, path)
            yield Item(name, FileMedia(file), sides.find(file), row.values)
        elif isinstance(row.file, Media):
            yield Item(name, row.file, values=row.values)
        else:
            yield Item(name, problem="no file in its column")


def _find_problem(values: Mapping[str, Any], settings: CacheSettings) -> str | None:
    """Why the values of a row cannot be used; long or nested ones would fill the memory."""
    for name, value in values.items():
        if isinstance(value, CellError):
            return f"the {name} cannot be read: {value}"
        if isinstance(value, (list, dict)):
            return f"the {name} must be text or a number, got {type(value).__name__}"
        if isinstance(value, (str, bytes)) and len(value) > settings.max_caption:
            try:
                clean_text(name, value, settings.max_caption)
            except BadExample as error:
                return str(error)
    return None


def _find_repeat(path: str, row: Row, first_rows: dict[int, int | str]) -> str | None:
    """Say which row has the same file and values; None if there is no such row."""
    first = first_rows.setdefault(xxh3_128_intdigest(repr((path, row.values)).encode()), row.name)
    return None if first == row.name else f"the same file and caption as row {first}"


def folder_of(table: str, settings: CacheSettings) -> str:
    """The folder that the paths in a table are relative to."""
    return str(settings.root or Path(table).parent)


@contextmanager
def _open_text(path: str, newline: str) -> Iterator[TextIO]:
    """Open a table; bytes that are not UTF-8 become surrogates, which captions are checked for.

    Raises:
        CacheError: If it cannot be opened or read.
    """
    with open_source(path) as file:
        encoding = encoding_of(file.read(4))
        file.seek(0)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
        yield TextIOWrapper(file, encoding, errors, newline)


def _read_lines(file: TextIO) -> Iterator[str]:
    """Lines with their ends; of one that is too long the beginning."""
    while line := file.readline(MAX_LINE):
        yield line
        while len(line) == MAX_LINE and not line.endswith("\n"):
            line = file.readline(MAX_LINE)


def read_jsonl(path: str, settings: CacheSettings) -> Iterator[Row]:
    """Rows of a file of JSON lines; each chooses among the columns that it has.

    Raises:
        CacheError: If it cannot be read, is one JSON list, or no row has a column that is needed.
    """
    names: dict[str, None] = {}
    with _open_text(path, "\n") as file:
        for number, line in enumerate(_read_lines(file), 1):
            text = line.strip()
            if not text:
                continue
            if not names and (text == "[" or text.startswith("[{")):
                convert = f"`jq -c '.[]' {os.path.basename(path)}` makes lines of it"
                raise CacheError(f"{path} is one JSON list, not a line for each row: {convert}")
            cells, problem = _parse_json(line)
            names.update(dict.fromkeys(cells))
            columns = choose_columns(cells.keys(), settings)
            values = {ours: cells[name] for ours, name in columns.items()}
            yield Row(number, values, values.pop(MEDIA, None), problem)
    if not names:
        raise CacheError(f"{path} has no line with a JSON object")
    check_columns(list(names), settings, path)


def _parse_json(line: str) -> tuple[dict[str, Any], str | None]:
    if len(line) == MAX_LINE:
        return {}, f"is longer than {MAX_LINE} characters"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is not a line of JSON: {error}"
    return (values, None) if isinstance(values, dict) else ({}, "is not a JSON object")


def read_csv(path: str, settings: CacheSettings) -> Iterator[Row]:
    """Rows of a CSV file, whose cells may be separated by other characters than commas.

    Raises:
        CacheError: If it cannot be read, or has no header or lacks a column.
    """
    csv.field_size_limit(MAX_LINE)  # of the whole process: Python has no other
    with _open_text(path, "") as file:
        lines = _read_lines(file)
        first = next((line for line in lines if line.strip()), "")
        if "\0" in first:
            raise CacheError(f"{path} holds NUL characters, as UTF-16 does: save it as UTF-8")
        lines = itertools.chain([first], lines)
        records = _CsvRecords(lines, _find_delimiter(path, first, settings), settings)
        header = [name.strip() for name in records.read_header()]
        if not any(header):
            raise CacheError(f"{path} has no header with the names of the columns")
        columns = check_columns(header, settings, path)
        places = {ours: header.index(name) for ours, name in columns.items()}
        for number, (cells, problem) in enumerate(records.read(len(header), places[MEDIA]), 2):
            if not cells and problem is None:
                continue
            values = {ours: cells[at] for ours, at in places.items() if at < len(cells)}
            yield Row(number, values, values.pop(MEDIA, None), problem)


def _find_delimiter(path: str, header: str, settings: CacheSettings) -> str:
    """The delimiter with which the header names a column of files; else the usual one."""
    usual = "\t" if path.lower().endswith(".tsv") else ","
    for mark in (usual, *DELIMITERS):
        names = next(csv.reader([header], delimiter=mark), [])
        if MEDIA in choose_columns([name.strip() for name in names], settings):
            return mark
    return usual


class _CsvRecords:
    """Records of a CSV file.

    A quotation mark that is not closed would swallow the lines up to the next one. So a wrong
    record of several lines ends with its first line.

    Args:
        lines: Lines of the file.
        delimiter: Between cells.
        settings: Settings of the build.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, settings: CacheSettings) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self._suffixes = media_suffixes(settings.kind)
        self._again: deque[str] = deque()  # lines that were given back
        self._taken: list[str] = []  # lines of this record

    def read_header(self) -> list[str]:
        """The first record."""
        try:
            return next(self._reader(self._feed()), [])
        except csv.Error:
            return []

    def read(self, width: int, media: int) -> Iterator[tuple[list[str], str | None]]:
        """The cells of each record, and its problem.

        Args:
            width: Number of columns.
            media: Column of the files.
        """
        reader = self._reader(self._feed())
        while True:
            self._taken = []
            try:
                cells = next(reader)
                problem = self._find_problem(cells, width, media)
            except StopIteration:
                return
            except csv.Error:
                cells, problem = [], BAD_QUOTES
            if problem is not None:
                if len(self._taken) > 1:
                    cells, problem = [], BAD_QUOTES
                    self._again.extendleft(reversed(self._taken[1:]))
                reader = self._reader(self._feed())
            yield cells, problem

    def _find_problem(self, cells: list[str], width: int, media: int) -> str | None:
        if any(len(line) == MAX_LINE for line in self._taken):
            return f"is longer than {MAX_LINE} characters"
        if any("\0" in line for line in self._taken):
            return "holds a NUL character"
        if cells and len(cells) != width:
            return f"has {len(cells)} cells, the header {width}"
        for line in self._taken[1:]:  # a row of its own that was swallowed
            inner = next(csv.reader([line], delimiter=self._delimiter), [])
            if len(inner) == width and suffix_of(inner[media].strip()) in self._suffixes:
                return BAD_QUOTES
        return None

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, skipinitialspace=True, strict=True)

    def _feed(self) -> Iterator[str]:
        while True:
            line = self._again.popleft() if self._again else next(self._lines, "")
            if not line:
                return
            self._taken.append(line)
            yield line.replace("\0", "\ufffd")  # which csv does not take before Python 3.11
