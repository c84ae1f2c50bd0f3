"""The ``diffnext`` command: finds the module of a sub-command, which reads the rest."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from diffnext.cli.parsing import Parser, quiet_imports
from diffnext.utils.messages import nearest
from diffnext.version import __version__

COMMANDS = {  # name: (module, what it does)
    "generate": ("diffnext.cli.generate", "generate pictures or videos from prompts"),
    "app": ("diffnext.cli.app", "generate in the browser"),
    "cache": ("diffnext.cli.cache", "turn pictures or clips into a dataset to train on"),
    "inspect": ("diffnext.cli.inspect_cache", "look into such a dataset, check it, reshard it"),
    "init": ("diffnext.cli.init", "write an untrained model, to be trained from scratch"),
    "train": ("diffnext.cli.train", "train or fine-tune a model"),
    "lora": ("diffnext.cli.lora", "merge trained adapters into their model"),
    "encode": ("diffnext.cli.encode", "encode the prompts of a benchmark"),
    "evaluate": (
        "diffnext.cli.evaluate",
        "generate the samples of GenEval or VBench; score shapes",
    ),
}
EXAMPLES = """
examples:
  diffnext generate "a red star" --model assets/nova-tiny
  diffnext app image assets/nova-tiny
  diffnext cache images photos --output dataset --vae nova/vae --size 1024
  diffnext inspect show dataset
  diffnext init --config configs/nova_photos_t2i.yaml --output untrained --tiny
  diffnext train config=configs/nova_d48w1024_sdxl1024.yaml experiment.output_dir=runs/first
  diffnext lora merge runs/lora/checkpoints/checkpoint-1000 merged
  diffnext encode --ckpt BAAI/nova-d48w1024-sdxl1024 --prompts prompts.json --output prompts.pth
  diffnext evaluate geneval --metadata metadata.jsonl --ckpt merged --outdir drawn

`diffnext COMMAND --help` says more. Exit codes: 0 done, 1 an error, told in one line, 2 a wrong
command line, 130 interrupted.
"""
WRONG_USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default the process's.

    Returns:
        The exit code; wrong command lines and some errors leave by ``SystemExit``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        build_parser().print_help(sys.stderr)
        return WRONG_USAGE
    if argv[0] not in COMMANDS:
        build_parser().parse_args(argv)  # --help, --version, or an error
        return WRONG_USAGE
    quiet_imports()
    name, *arguments = argv
    module = importlib.import_module(COMMANDS[name][0])  # only this one: each takes its time
    try:
        return module.main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> Parser:
    """The parser of everything before a command."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    parser = Parser(
        prog="diffnext",
        usage="diffnext COMMAND ...",
        description="NOVA: autoregressive image and video generation.\n\ncommands:\n"
        + "\n".join(lines),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffnext {__version__}")
    parser.add_argument("command", type=_command, metavar="COMMAND", help="one of those above")
    return parser


def _command(word: str) -> str:
    if word not in COMMANDS:
        raise argparse.ArgumentTypeError(f"there is no {word!r}{nearest(word, COMMANDS)}")
    return word


if __name__ == "__main__":
    sys.exit(main())
