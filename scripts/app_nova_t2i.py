"""Draw pictures in the browser: `diffnext app image` with NOVA-tiny, if no other model is named.

    python scripts/app_nova_t2i.py
    python scripts/app_nova_t2i.py --model BAAI/nova-d48w1024-sdxl1024 --device 0

Open the address that it prints; see docs/apps.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffnext.cli.app import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code."""
    return run_script("image", __file__, __doc__, "nova-tiny", argv)


if __name__ == "__main__":
    sys.exit(main())
