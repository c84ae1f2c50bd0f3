"""The ``diffnext`` command: finds the module of a sub-command, which reads the rest."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from diffnext.version import __version__

COMMANDS = {  # name: (module, what it does)
    "generate": ("diffnext.cli.generate", "draw pictures or a video of a prompt"),
    "cache": ("diffnext.cli.cache", "turn pictures or clips into a dataset to train on"),
    "inspect": ("diffnext.cli.inspect_cache", "look into such a dataset, check it, cut it anew"),
    "train": ("diffnext.cli.train", "train or fine-tune a model"),
}
EXAMPLES = """
examples:
  diffnext generate --model assets/nova-tiny "a red star" --guidance-scale 2.5
  diffnext cache images photos --output dataset --vae nova/vae --size 1024
  diffnext inspect show dataset
  diffnext train config=configs/nova_d48w1024_sdxl1024.yaml experiment.output_dir=runs/first

`diffnext COMMAND --help` says more. Exit codes: 0 done, 1 an error, told in one line, 2 a wrong
command line, 130 interrupted.
"""
WRONG_USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code; wrong command lines and some errors leave by ``SystemExit``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        build_parser().print_help(sys.stderr)
        return WRONG_USAGE
    if argv[0] not in COMMANDS:
        build_parser().parse_args(argv)  # --help, --version, or an error that names the commands
        return WRONG_USAGE
    name, *arguments = argv
    module = importlib.import_module(COMMANDS[name][0])  # this one alone: each takes its time
    try:
        return module.main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="diffnext",
        usage="diffnext COMMAND ...",
        description="NOVA: autoregressive image and video generation.\n\ncommands:\n"
        + "\n".join(lines),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffnext {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    return parser


if __name__ == "__main__":
    sys.exit(main())
