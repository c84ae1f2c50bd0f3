"""``python -m diffnext``: the command line."""

import sys

from diffnext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
