"""Build a record dataset of latents: see ``python scripts/build_cache.py --help``."""

import sys

from diffnext.cli.cache import main

if __name__ == "__main__":
    sys.exit(main())
