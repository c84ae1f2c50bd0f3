"""``diffnext app``, and the scripts that open a page with a model of this repository."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from diffnext.cli.parsing import MODEL_HELP, PRECISIONS, command_parser, quiet_imports

DESCRIPTION = """\
Generate in the browser; prints the address to open.

  diffnext app image assets/nova-tiny
  diffnext app image BAAI/nova-d48w1024-sdxl1024 --device 1
  diffnext app video BAAI/nova-d48w1024-osp480 --port 8080

It needs gradio: pip install "gradio>=6.31".
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = command_parser("diffnext app", DESCRIPTION)
    parser.add_argument("kind", choices=("image", "video"), help="what to make")
    parser.add_argument("model", help=MODEL_HELP)
    return run(parser, argv)


def run_script(
    kind: str, file: str, description: str, model: str, argv: Sequence[str] | None
) -> int:
    """Run the command line of a script, which has a model of its own.

    Args:
        kind: "image" or "video".
        file: The script.
        description: Its docstring.
        model: Name of a folder in ``assets``.
        argv: Words of the command line; None takes the process's.
    """
    path = Path(file).resolve()
    parser = command_parser(path.name, description)
    parser.set_defaults(kind=kind)
    parser.add_argument(
        "--model",
        default=str(path.parents[1] / "assets" / model),
        help=f"release folder, training checkpoint or Hub id (assets/{model})",
    )
    return run(parser, argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse what is left of a command line, and open the page that it names."""
    quiet_imports()
    add = parser.add_argument
    add("--device", type=int, default=0, metavar="N", help="index of the GPU, if any (0)")
    add(
        "--precision",
        type=str.lower,
        choices=PRECISIONS[:-1],
        default="auto",
        help="of the weights (float16; float32 without a GPU)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets in all who can reach this machine (127.0.0.1)",
    )
    add("--port", type=int, metavar="N", help="to listen on (the first free one from 7860 on)")
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("a model is needed: a folder or a Hub id")
    if args.device < 0:
        parser.error(f"--device must be at least 0, got {args.device}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must be 1 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        print('error: the apps need gradio: pip install "gradio>=6.31"', file=sys.stderr)
        return 1
    # Read by torch and tokenizers as they start, which is now.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from diffnext.apps.server import serve

    return serve(args)
