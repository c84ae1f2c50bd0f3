"""What all commands share: how they show their texts, and how they report errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from diffnext.utils.messages import nearest

__all__ = ["Parser", "add_device_options", "command_parser", "quiet_imports", "run"]

MODEL_HELP = (
    "release folder, training checkpoint, Hub id, or the output folder of a training run, of which "
    "the newest checkpoint is taken, with averaged weights if it has them"
)
PRECISIONS = ("auto", "float16", "bfloat16", "float32", "float64")

# Loggers that warn, at import, of parts of other libraries that nothing here uses.
CHATTY_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def quiet_imports() -> None:
    """Keep those loggers to errors; for programs, before they import what takes seconds."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line in one line, with the nearest right word."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, which tells :meth:`error` too little about what was typed."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error and leave; an unknown option comes before what is missing for it."""
        known = [option for action in self._actions for option in action.option_strings]
        words = () if self._subparsers else self._words  # whose options are those of a command
        for word in (word.partition("=")[0] for word in words if word.startswith("--")):
            if not any(option.startswith(word) for option in known):
                message = f"unknown option {word}{nearest(word, known)}"
                break
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def command_parser(name: str, description: str, epilog: str | None = None) -> Parser:
    """A parser that shows its texts as they are written.

    Args:
        name: The command as it is typed.
        description: What it does, with examples.
        epilog: Text after the list of options.
    """
    return Parser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--precision``."""
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (the best there is)")
    add(
        "--precision",
        type=str.lower,
        choices=PRECISIONS,
        default="auto",
        metavar="TYPE",
        help=f"{', '.join(PRECISIONS[1:])} (float16; on a CPU float32)",
    )


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
