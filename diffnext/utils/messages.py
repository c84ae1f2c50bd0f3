"""The words of messages about wrong values; nothing here needs torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["did_you_mean", "explain", "naming", "nearest", "one_line"]

# Rules in other words than pydantic's.
_RULES = {
    "missing": "must be given",
    "missing inside": "must be longer",
    "too_long": "must be shorter",
    "tuple_type": "must be a list or a tuple",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "dict_type": "must hold key: value pairs",
    "dataclass_type": "must hold key: value pairs",
    "unexpected_keyword_argument": "has no use here",
}


def explain(parts: Iterable[Mapping[str, Any]], depth: int = 1) -> str:
    """Say what a value must be, from pydantic's errors about it.

    Args:
        parts: Errors about one value, of which one alternative must hold.
        depth: Length of a location that names the value itself; longer ones lie inside of it.
    """
    rules = []
    for part in parts:
        if part["type"] == "needs_python_object":
            continue  # an alternative that no file can hold
        kind = part["type"] if len(part["loc"]) <= depth else f"{part['type']} inside"
        rule = part["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        rules.append(_RULES.get(kind, _RULES.get(part["type"], rule)))
    first, *others = dict.fromkeys(rules or ["must be another kind of value"])
    return " or ".join([first, *(rule.removeprefix("must be ") for rule in others)])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put an argument's name before the message of an error inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def did_you_mean(path: Path) -> str:
    """The end of a message about a missing path: an existing one with nearly the same name."""
    for place in (path, *path.parents):
        if not place.exists() and place.parent.is_dir():
            names = [one.name for one in place.parent.iterdir() if one.exists()]
            close = difflib.get_close_matches(place.name, names, n=1)
            if not close:
                return ""
            found = place.parent / close[0]
            whole = found / path.relative_to(place)
            return f"; did you mean {whole if whole.exists() else found}?"
    return ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: a known one that is nearly the same."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def one_line(value: Any) -> str:
    """A value as messages show it."""
    if getattr(value, "ndim", 0) > 1:  # an array or a tensor
        return f"{type(value).__name__} {tuple(value.shape)}, {value.dtype}"
    text = " ".join(f"{value!r}".split())
    return text if len(text) <= 80 else f"{text[:77]}..."
