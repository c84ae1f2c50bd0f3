"""Draw pictures in the browser.

    python scripts/app_nova_t2i.py
    python scripts/app_nova_t2i.py --model BAAI/nova-d48w1024-sdxl1024 --device 0

Open the address that it prints; see docs/apps.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apps.options import ASSETS, parse_args, set_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code."""
    args = parse_args(argv, __doc__, ASSETS / "nova-tiny")
    set_environment()
    # Only now, because they import torch, which reads the environment.
    from apps.image_app import DEFAULTS, RANGES, ImageApp
    from apps.server import serve

    return serve(ImageApp, DEFAULTS, RANGES, args)


if __name__ == "__main__":
    sys.exit(main())
