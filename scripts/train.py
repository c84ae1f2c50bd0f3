"""Train a model: accelerate launch scripts/train.py config=<file.yaml> key.path=value ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffnext.cli import train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see :mod:`diffnext.cli.train`."""
    return train.main(argv, program="train.py")


if __name__ == "__main__":
    sys.exit(main())
