"""Show what pictures and videos were made with, as JSON: the apps write it into their files.

    python scripts/show_parameters.py nova-7.webp clip.mp4

A file that carries none is an error: exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffnext.cli.parsing import command_parser
from diffnext.utils import read_parameters


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if a file carries no parameters."""
    parser = command_parser("show_parameters.py", __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="pictures and videos")
    exit_code = 0
    for file in parser.parse_args(argv).files:
        try:
            print(json.dumps({"file": str(file), **read_parameters(file)}, indent=2))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            exit_code = 1
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
