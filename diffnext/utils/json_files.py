"""JSON files: written whole, and checked when read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "FileError",
    "naming_place",
    "read_json",
    "same_value",
    "write_json",
    "write_lines",
    "write_whole",
]


class FileError(ValueError):
    """A file or folder breaks a rule; the message names both."""


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileError: If it is not a JSON object; the message names the file.
        OSError: If it cannot be opened.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would never end
        raise FileError(f"{path} is not a regular file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


@contextlib.contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """Add the file or folder to errors of writing; the error of a full disk does not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, so that the file is whole or not there.

    A link in its place is replaced, and the file that it leads to stays as it is.
    """
    write_whole(path, [f"{as_text(content)}\n"])


def as_text(content: dict[str, Any]) -> str:
    """A JSON object as :func:`write_json` writes it, without the line break at the end."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a file of JSON lines, so that it is whole or not there."""
    write_whole(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_whole(path: Path, parts: Iterable[str | bytes]) -> None:
    """Write a file, so that it is whole or not there; a link in its place is replaced."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with naming_place(temporary), open(temporary, "xb") as file:
        file.writelines(part.encode() if isinstance(part, str) else part for part in parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def same_value(one: object, other: object) -> bool:
    """Whether two values of a config mean the same; one number means a square."""
    if isinstance(one, int) and isinstance(other, list | tuple):
        one = [one] * len(other)
    if isinstance(other, int) and isinstance(one, list | tuple):
        other = [other] * len(one)
    one, other = (list(v) if isinstance(v, tuple) else v for v in (one, other))
    return one == other
