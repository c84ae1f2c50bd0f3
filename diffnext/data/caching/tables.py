"""Items of tables: CSV, JSON lines, Parquet and the ``datasets`` of Hugging Face."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.items import Item, side_files
from diffnext.data.caching.media import FileMedia, RowMedia
from diffnext.data.caching.settings import CacheSettings, Columns

MEDIA_NAMES = {
    "images": "file_name file filename path image image_path jpg png".split(),
    "videos": "file_name file filename path video video_path mp4 clip".split(),
}
VALUE_NAMES = ("caption", "text", "label", "flow")
MAX_FIELD = 2**31 - 1  # characters of a CSV field; long captions are skipped one by one


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number: Of the line, or of the row, from 1.
        values: By column, all but the bytes of media.
        problem: Why it cannot be read.
        load_media: Reads a cell that is not in ``values``.
    """

    number: int
    values: dict[str, Any]
    problem: str | None = None
    load_media: Callable[[], Any] | None = None


def table_items(paths: list[str], table_format: str, settings: CacheSettings) -> Iterator[Item]:
    """Items of tables, row by row.

    Raises:
        CacheError: If a table cannot be read or lacks a column.
    """
    read = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}[table_format]
    for path in paths:
        root = settings.root or Path(path).parent
        label = os.path.basename(path)
        yield from _row_items(label, read(path, settings), settings, root)


def huggingface_items(settings: CacheSettings) -> Iterator[Item]:
    """Items of a folder that ``datasets.save_to_disk`` wrote.

    Raises:
        CacheError: If it cannot be read, lacks a column, or ``split`` is needed.
    """
    try:
        import datasets
    except ImportError as error:
        raise CacheError("reading Hugging Face datasets needs `pip install datasets`") from error
    try:
        dataset = datasets.load_from_disk(settings.source)
    except (OSError, ValueError) as error:
        raise CacheError(f"{settings.source} is not a saved dataset: {error}") from error
    dataset = _choose_split(dataset, settings)
    media = find_media_column(dataset.column_names, settings, settings.source)
    if isinstance(dataset.features[media], (datasets.Image, datasets.Video)):
        kind = type(dataset.features[media])
        dataset = dataset.cast_column(media, kind(decode=False))
    others = dataset.remove_columns([media])
    rows = (
        Row(i + 1, others[i] if others.column_names else {}, None, _Cell(dataset, i, media))
        for i in range(len(dataset))
    )
    label = os.path.basename(os.path.normpath(settings.source))
    yield from _row_items(label, (dataset.column_names, rows), settings, Path(settings.source))


def find_media_column(names: Iterable[str], settings: CacheSettings, table: str) -> str:
    """The column of the media.

    Raises:
        CacheError: If there is none.
    """
    wanted = settings.columns.media
    names = list(names)
    candidates = MEDIA_NAMES[settings.kind] if wanted is None else [wanted]
    for name in candidates:
        if name in names:
            return name
    raise CacheError(
        f"{table} has no column {' or '.join(map(repr, candidates))}; it has {', '.join(names)}"
    )


def find_value_columns(names: Iterable[str], columns: Columns, table: str) -> dict[str, str]:
    """The columns of caption, text, label and flow, as far as there are.

    Where only ``text`` exists, it is the caption.

    Raises:
        CacheError: If a column that was asked for does not exist.
    """
    names = list(names)
    found = {}
    for value in VALUE_NAMES:
        wanted = getattr(columns, value)
        if wanted is not None and wanted not in names:
            raise CacheError(f"{table} has no column {wanted!r}; it has {', '.join(names)}")
        if wanted is not None or value in names:
            found[value] = wanted or value
    if "caption" not in found and "text" in found and columns.text is None:
        found["caption"] = found.pop("text")
    return found


def read_csv(path: str, settings: CacheSettings) -> tuple[list[str], Iterator[Row]]:
    """Columns and rows of a CSV (or, by its suffix, TSV) file.

    Raises:
        CacheError: If it cannot be read or has no header.
    """
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with _readable(path) as file:
        header = next(_csv_reader(file, delimiter), None)
    if not header:
        raise CacheError(f"{path} has no header with the names of the columns")
    return header, _csv_rows(path, delimiter, header)


def read_jsonl(path: str, settings: CacheSettings) -> tuple[list[str], Iterator[Row]]:
    """Columns, those of all rows, and rows of a file of JSON lines.

    Raises:
        CacheError: If it cannot be read.
    """
    names: dict[str, None] = {}
    for row in _json_rows(path):
        names.update(dict.fromkeys(row.values))
    return list(names), _json_rows(path)


def read_parquet(path: str, settings: CacheSettings) -> tuple[list[str], Iterator[Row]]:
    """Columns and rows of a Parquet file; cells of media are read when they are needed.

    Raises:
        CacheError: If pyarrow is missing or the file cannot be read.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CacheError("reading Parquet files needs `pip install pyarrow`") from error
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise CacheError(f"{path} is not a readable Parquet file: {error}") from error
    media = find_media_column(names, settings, path)
    return names, _parquet_rows(path, names, media, sizes)


def _row_items(
    label: str, table: tuple[list[str], Iterable[Row]], settings: CacheSettings, root: Path
) -> Iterator[Item]:
    names, rows = table
    media_column = find_media_column(names, settings, label)
    columns = find_value_columns(names, settings.columns, label)
    first_rows: dict[tuple, int] = {}
    for row in rows:
        cell = row.values.get(media_column)
        path = cell if isinstance(cell, str) and cell else None
        name = f"{label}:{row.number}" + (f" {path}" if path else "")
        values = {value: row.values.get(column) for value, column in columns.items()}
        problem = row.problem or _find_repeat(path, values, row.number, first_rows)
        if problem is not None:
            yield Item(name, problem=problem)
        elif path is not None:
            file = os.path.join(root, path)
            sides = {} if "\0" in file else side_files(file, os.path.exists)
            yield Item(name, FileMedia(file), sides, values)
        elif row.load_media is not None:
            yield Item(name, RowMedia(row.load_media, root), {}, values)
        else:
            yield Item(name, problem=f"no file in the column {media_column!r}")


def _find_repeat(
    path: str | None, values: dict[str, Any], number: int, first_rows: dict[tuple, int]
) -> str | None:
    """Say which row has the same file and values; None if there is no such row."""
    if path is None:
        return None
    key = (path, json.dumps(values, default=repr, sort_keys=True))
    first = first_rows.setdefault(key, number)
    return None if first == number else f"the same file and caption as row {first}"


@contextlib.contextmanager
def _readable(path: str) -> Iterator[Any]:
    """Open a table; bytes that are no UTF-8 become surrogates, which the captions are checked for.

    Raises:
        CacheError: If it cannot be opened.
    """
    try:
        file = open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


def _csv_reader(file: Any, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD)  # of the whole process: Python has no other
    return csv.reader((line.replace("\0", "\ufffd") for line in file), delimiter=delimiter)


def _csv_rows(path: str, delimiter: str, header: list[str]) -> Iterator[Row]:
    with _readable(path) as file:
        reader = _csv_reader(file, delimiter)
        next(reader)
        number = 1
        for cells in reader:
            number += 1
            if not cells:
                continue
            values = dict(zip(header, cells, strict=False))
            problem = None
            if len(cells) != len(header):
                problem = f"has {len(cells)} cells, the header {len(header)}"
            yield Row(number, values, problem)


def _json_rows(path: str) -> Iterator[Row]:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"is not a line of JSON: {error}")
                continue
            if isinstance(values, dict):
                yield Row(number, values)
            else:
                yield Row(number, {}, "is not a JSON object")


def _parquet_rows(path: str, names: list[str], media: str, sizes: list[int]) -> Iterator[Row]:
    """Rows of all row groups; a column of paths is read with the others, one of bytes is not."""
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as table:
        kind = table.schema_arrow.field(media).type
        has_paths = types.is_string(kind) or types.is_large_string(kind)
        wanted = [name for name in names if name != media or has_paths]
        number = 0
        for group, size in enumerate(sizes):
            rows = table.read_row_group(group, columns=wanted).to_pylist() if wanted else []
            for i in range(size):
                number += 1
                load = (
                    None if has_paths else functools.partial(_parquet_cell, path, group, media, i)
                )
                yield Row(number, rows[i] if rows else {}, None, load)


_parquet_lock = threading.Lock()


@functools.lru_cache(maxsize=2)
def _parquet_column(path: str, group: int, column: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        return table.read_row_group(group, columns=[column]).column(0)


def _parquet_cell(path: str, group: int, column: str, index: int) -> Any:
    with _parquet_lock:  # neighbours wait for their row group in place of reading it as well
        cells = _parquet_column(path, group, column)
    return cells[index].as_py()


@dataclass(frozen=True)
class _Cell:
    """Reads one cell of a Hugging Face dataset."""

    dataset: Any
    index: int
    column: str

    def __call__(self) -> Any:
        return self.dataset[self.index][self.column]


def _choose_split(dataset: Any, settings: CacheSettings) -> Any:
    splits = list(dataset) if isinstance(dataset, dict) else []
    if not splits:
        return dataset
    if settings.split is None and len(splits) == 1:
        return dataset[splits[0]]
    if settings.split not in splits:
        raise CacheError(
            f"{settings.source} has the splits {', '.join(splits)}; got split {settings.split!r}"
        )
    return dataset[settings.split]
