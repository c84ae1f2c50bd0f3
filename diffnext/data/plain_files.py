"""Files of a dataset, which may come from a stranger: no links, no devices, typed JSON.

A link could lead to any other file, reading a pipe would never end, and JSON may hold anything.
Whatever breaks a rule is a ``RecordError`` that names the file and the rule.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from diffnext.data.record_format import RecordError
from diffnext.utils.messages import explain

T = TypeVar("T")

MAX_JSON_BYTES = 2**24
MAX_ERRORS = 3  # named in a message


def open_plain(path: str | os.PathLike[str], follow_links: bool = False) -> BinaryIO:
    """Open a regular file for reading; opening other kinds could block.

    Args:
        path: Path of the file.
        follow_links: Whether the last part of the path may be a link.

    Raises:
        RecordError: If it is a link, a folder, a pipe or a device.
        OSError: If it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise RecordError(
                f"{path} is a link: a dataset must hold its files itself (`cp -rL` copies them)"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RecordError(f"{path} is not a regular file")
    return io.BufferedReader(_PlainFile(descriptor))


class _PlainFile(io.FileIO):
    """A file that ends where there is nothing more to read; some in /proc wait for more."""

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        if count is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return count


def read_typed(path: Path, kind: TypeAdapter[T]) -> T:
    """Read a JSON file.

    Args:
        path: Path of the file.
        kind: Type of its content.

    Raises:
        RecordError: If it holds something else, or is not a plain file; all errors are named.
        OSError: If it cannot be opened.
    """
    with open_plain(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise RecordError(f"{path} must have at most {MAX_JSON_BYTES} bytes")
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        raise RecordError(f"{path}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    """All errors in one line."""
    lines = []
    for entry in error.errors(include_url=False)[:MAX_ERRORS]:
        rule = explain([entry], len(entry["loc"]))
        key = ".".join(map(str, entry["loc"]))
        got = "" if entry["type"] == "missing" else f", got {entry['input']!r:.80}"
        lines.append(f"{key}: {rule}{got}" if key else rule)
    return "; ".join(lines)
