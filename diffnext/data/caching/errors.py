"""What can go wrong while a cache is built."""


class CacheError(ValueError):
    """The build cannot go on: wrong settings, an unreadable source, a foreign output folder."""


class BadExample(Exception):
    """One example cannot be used; the message is the reason that ``skipped.jsonl`` gives."""
