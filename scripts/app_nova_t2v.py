"""Draw videos in the browser, of a prompt or of a prompt and a picture.

    python scripts/app_nova_t2v.py
    python scripts/app_nova_t2v.py --model BAAI/nova-d48w1024-osp480 --device 0

Open the address that it prints; see docs/apps.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apps.options import ASSETS, parse_args, set_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app; returns the exit code."""
    args = parse_args(argv, __doc__, ASSETS / "nova-tiny-video")
    set_environment()
    # Only now, because they import torch, which reads the environment.
    from apps.server import serve
    from apps.video_app import DEFAULTS, RANGES, VideoApp

    return serve(VideoApp, DEFAULTS, RANGES, args)


if __name__ == "__main__":
    sys.exit(main())
