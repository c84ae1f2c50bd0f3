"""Markdown tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_table(figures: Sequence[dict[str, Any]]) -> str:
    """A table of objects, with a column for every name that occurs."""
    names = list(dict.fromkeys(name for one in figures for name in one))
    rows = [names, ["---"] * len(names)]
    rows += [[format_cell(one.get(name)) for name in names] for one in figures]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def format_cell(value: Any) -> str:
    """A number with four digits, whole ones as they are, or text."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "/")


def print_head(*names: str) -> None:
    """The head of a table that is printed row by row."""
    print_row(*names)
    print("|---" * len(names) + "|", flush=True)


def print_row(*cells: Any) -> None:
    """A row of it."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
