"""What all commands share: how they show their texts, and how they report errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

__all__ = ["add_device_options", "command_parser", "quiet_imports", "run"]

# Loggers that warn, at import, of parts of other libraries that nothing here uses.
CHATTY_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def quiet_imports() -> None:
    """Keep those loggers to errors; for programs, before they import what takes seconds."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def command_parser(
    name: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser that shows its texts as they are written.

    Args:
        name: The command as it is typed.
        description: What it does, with examples.
        epilog: Text after the list of options.
    """
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--precision``."""
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (the best there is)")
    precisions = "float16, bfloat16 or float32 (float16; on a CPU float32)"
    add("--precision", default="auto", help=precisions)


def run(command: Callable[[], int | None]) -> int:
    """Do what a command line asks for.

    Returns:
        The exit code: the command's own or 0, or 1 after an error, which is printed as one line.
    """
    try:
        return command() or 0
    except (OSError, RuntimeError, ValueError, MemoryError, ImportError) as error:
        text = str(error) or type(error).__name__
        print("error:", *text.splitlines(), file=sys.stderr)
        return 1
