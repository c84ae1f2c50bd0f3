"""Measure, side by side with a baseline: the script for ``diffnext benchmark`` in a checkout.

    python scripts/benchmark.py generate --model assets/nova-tiny --sets 64 --steps 25

``--help`` has the other commands; the code is in :mod:`diffnext.cli.benchmark`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffnext.cli import benchmark


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return benchmark.main(argv, "benchmark.py", "python scripts/benchmark.py")


if __name__ == "__main__":
    sys.exit(main())
