"""diffnext: autoregressive image and video generation without vector quantisation (NOVA)."""

import sys

from diffnext.version import __version__

__all__ = ["__version__"]

if "codewithgpu" in sys.modules:  # it can then write records with any version of protobuf
    from diffnext.data.codewithgpu_compat import repair

    repair()
