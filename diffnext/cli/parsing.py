"""What the parsers of all commands share."""

from __future__ import annotations

import argparse

__all__ = ["command_parser"]


def command_parser(
    name: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser that shows its texts as they are written.

    Args:
        name: Of the command, as it is typed.
        description: What it does, with examples.
        epilog: What follows the list of options.
    """
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
