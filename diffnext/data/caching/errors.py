"""Errors while a cache is built."""

from dataclasses import dataclass


class CacheError(ValueError):
    """The build cannot continue: wrong settings, an unreadable source, a foreign output folder."""


class BadExample(Exception):
    """One example cannot be used; the message is the reason that ``skipped.jsonl`` gives."""


@dataclass(frozen=True)
class Skipped:
    """An item or example that was left out, and why; a line of ``skipped.jsonl``."""

    source: str
    reason: str


def printable(text: str) -> str:
    """A text that can be written as UTF-8, which names of files need not be."""
    return text.encode("utf-8", "backslashreplace").decode()
