"""The command line of the apps. Importing it is quick: neither torch nor gradio is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ASSETS", "parse_args", "set_environment"]

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PRECISIONS = ("float16", "bfloat16", "float32")


def parse_args(
    argv: Sequence[str] | None, description: str, default_model: Path
) -> argparse.Namespace:
    """Parse the command line; wrong arguments end the process with exit code 2.

    Args:
        argv: Words of the command line; None takes the process's.
        description: Docstring of the script.
        default_model: Folder of the model that comes with the code; it may be missing.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_default = default_model.is_dir()
    default_name = f"assets/{default_model.name}"
    parser.add_argument(
        "--model",
        default=str(default_model) if has_default else None,
        help=f"folder or Hub id ({default_name if has_default else 'needed'})",
    )
    parser.add_argument("--device", type=int, default=0, help="index of the GPU, if any (0)")
    parser.add_argument(
        "--precision",
        type=str.lower,
        choices=PRECISIONS,
        help="of the weights (float16; float32 without a GPU)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets everyone in who reaches this machine (127.0.0.1)",
    )
    parser.add_argument("--port", type=int, help="to listen on (the first free one from 7860 on)")
    args = parser.parse_args(argv)
    if not args.model:
        reason = "" if has_default else f": there is no {default_name} here"
        parser.error(f"--model is needed, a folder or Hub id{reason}")
    if args.device < 0:
        parser.error(f"--device must be 0 or more, got {args.device}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must be 1 to 65535, got {args.port}")
    return args


def set_environment() -> None:
    """Set what torch and tokenizers read when they start, unless the user did."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
