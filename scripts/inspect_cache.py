"""Look into a record dataset: see ``python scripts/inspect_cache.py --help``."""

import sys

from diffnext.cli.inspect_cache import main

if __name__ == "__main__":
    sys.exit(main())
