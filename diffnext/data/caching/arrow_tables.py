"""Rows of Parquet files and of Hugging Face ``datasets``, read with Arrow."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.media import Media, file_stamp, open_cell, open_source
from diffnext.data.caching.settings import CacheSettings
from diffnext.data.caching.tables import MEDIA, CellError, Row, check_columns, folder_of

ROWS = 1024  # read at once where there are only texts
PICTURES = 8  # read at once where there are bytes
BUFFER = 2**20  # bytes read at once; else Arrow would read the column of a row group whole
MAX_REASON = 200


def read_parquet(path: str, settings: CacheSettings) -> Iterator[Row]:
    """Rows of a Parquet file; cells with bytes of media are read when they are needed.

    If a row group is damaged, the rows after the damage become one row with a problem.

    Raises:
        CacheError: If pyarrow is missing, the file cannot be read or lacks a column.
    """
    with _open_parquet(path) as table:
        names = table.schema_arrow.names
        columns = check_columns(names, settings, path)
        media = columns[MEDIA]
        has_paths = _is_text(table.schema_arrow.field(media).type)
        if not has_paths:
            del columns[MEDIA]
        root = folder_of(path, settings)
        number = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            first = number
            try:
                for values in _read_rows(table, group, size, columns):
                    cell = ParquetMedia(path, group, media, number - first, root)
                    number += 1
                    yield Row(number, values, values.pop(MEDIA) if has_paths else cell)
            except Exception as error:  # Arrow raises errors of any type on damaged files
                problem = f"row group {group} of {path} cannot be read: {_reason(error)}"
                yield Row(f"{number + 1}-{first + size}", {}, problem=problem)
            number = first + size


def _read_rows(
    table: Any, group: int, size: int, columns: dict[str, str]
) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(size))
        return
    names = list(dict.fromkeys(columns.values()))
    for batch in table.iter_batches(ROWS, row_groups=[group], columns=names):
        yield from _to_rows(batch, columns)


def _to_rows(batch: Any, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of a batch or table of Arrow, by our names of the columns."""
    cells = [_to_values(batch.column(name)) for name in columns.values()]
    for row in zip(*cells, strict=True):
        yield dict(zip(columns, row, strict=True))


def _to_values(column: Any) -> Sequence[Any]:
    """Cells as Python values; a CellError for one that cannot be converted."""
    try:
        return column.to_pylist()
    except Exception:  # a value that Python does not have, or not UTF-8
        return [_to_value(cell) for cell in column]


def _to_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except Exception as error:
        return CellError(_reason(error))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CacheError("reading Parquet files needs `pip install pyarrow`") from error
    with open_source(path) as file:
        try:
            table = parquet.ParquetFile(
                file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
        except Exception as error:  # Arrow raises errors of any type on damaged files
            reason = _reason(error)
            raise CacheError(f"{path} is not a readable Parquet file: {reason}") from error
        yield table


@dataclass(frozen=True, slots=True)
class ParquetMedia(Media):
    """A cell of a Parquet file that holds the bytes themselves, or a path.

    Attributes:
        table: Path of the file.
        group: Row group.
        column: Name of the column.
        row: Number in the row group, from 0.
        root: Folder that the path is relative to.
    """

    table: str
    group: int
    column: str
    row: int
    root: str

    def open(self) -> BinaryIO:
        """Read the cell."""
        try:
            cells = _column_of(self.table, tuple(self.stamp()), self.group, self.column)
            cell = cells.read(self.row)
        except Exception as error:  # Arrow raises errors of any type on damaged files
            _column_of.cache_clear()
            where = f"row group {self.group} of {self.table}"
            raise BadExample(f"{where} cannot be read: {_reason(error)}") from error
        return open_cell(cell, self.root)

    def stamp(self) -> list[int]:
        """Size and times of the table."""
        return file_stamp(self.table)


class _Column:
    """A column of a row group, read from front to back, a few cells at a time.

    Args:
        table: Path of the Parquet file.
        group: Row group.
        name: Name of the column.
    """

    def __init__(self, table: str, group: int, name: str) -> None:
        self._place = (table, group, name)
        self._first = 0
        self._cells: Any = []
        self._batches = _iterate_column(table, group, name)

    def read(self, row: int) -> Any:
        """A cell; back is slow."""
        if row < self._first:
            self._first, self._cells = 0, []
            self._batches = _iterate_column(*self._place)
        while row >= self._first + len(self._cells):
            self._first += len(self._cells)
            self._cells = next(self._batches).column(0)
        return self._cells[row - self._first].as_py()


def _iterate_column(path: str, group: int, name: str) -> Iterator[Any]:
    with _open_parquet(path) as table:
        yield from table.iter_batches(PICTURES, row_groups=[group], columns=[name])


@functools.lru_cache(maxsize=1)
def _column_of(path: str, stamp: tuple[int, ...], group: int, name: str) -> _Column:
    """The column that this process reads now; another if the table was replaced."""
    return _Column(path, group, name)


def read_saved_dataset(settings: CacheSettings) -> Iterator[Row]:
    """Rows of a folder that ``datasets.save_to_disk`` wrote.

    Raises:
        CacheError: If it cannot be read, lacks a column, or ``split`` is needed.
    """
    folder = settings.source
    split = _choose_split(_load_saved(folder), settings)
    dataset = _saved_dataset(folder, split)
    columns = check_columns(dataset.column_names, settings, folder)
    media = columns.pop(MEDIA)
    texts = dataset.select_columns(list(dict.fromkeys(columns.values())))
    for first in range(0, len(dataset), ROWS):
        stop = min(first + ROWS, len(dataset))
        try:
            rows = list(_to_rows(texts[first:stop], columns)) if columns else [{}] * (stop - first)
        except Exception as error:  # Arrow raises errors of any type on damaged files
            problem = f"{folder} cannot be read: {_reason(error)}"
            yield Row(f"{first + 1}-{stop}", {}, problem=problem)
            continue
        for row, values in enumerate(rows, first):
            yield Row(row + 1, values, SavedMedia(folder, split, media, row))


@dataclass(frozen=True, slots=True)
class SavedMedia(Media):
    """A cell of a saved Hugging Face dataset that holds the bytes themselves, or a path.

    Attributes:
        folder: Folder of the dataset.
        split: Split of the dataset; None if it has none.
        column: Name of the column.
        row: From 0.
    """

    folder: str
    split: str | None
    column: str
    row: int

    def open(self) -> BinaryIO:
        """Read the cell."""
        try:
            dataset = _saved_dataset(self.folder, self.split)
            cell = dataset[self.row].column(self.column)[0].as_py()
        except Exception as error:  # Arrow raises errors of any type on damaged files
            raise BadExample(f"{self.folder} cannot be read: {_reason(error)}") from error
        return open_cell(cell, self.folder)

    def stamp(self) -> list[int]:
        """Size and times of the file that names the dataset's other files."""
        return file_stamp(os.path.join(self.folder, self.split or "", "state.json"))


@functools.lru_cache(maxsize=2)
def _saved_dataset(folder: str, split: str | None) -> Any:
    """A saved dataset in Arrow's format, so nothing is decoded."""
    dataset = _load_saved(folder)
    return (dataset if split is None else dataset[split]).with_format("arrow")


def _load_saved(folder: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CacheError("reading Hugging Face datasets needs `pip install datasets`") from error
    try:
        return datasets.load_from_disk(folder)
    except Exception as error:  # it raises errors of any type on damaged files
        raise CacheError(f"{folder} is not a saved dataset: {_reason(error)}") from error


def _choose_split(dataset: Any, settings: CacheSettings) -> str | None:
    splits = list(dataset) if isinstance(dataset, dict) else []
    if not splits:
        return None
    if settings.split is None and len(splits) == 1:
        return splits[0]
    if settings.split not in splits:
        raise CacheError(
            f"{settings.source} has the splits {', '.join(splits)}; got split {settings.split!r}"
        )
    return settings.split


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0][:MAX_REASON]
