"""diffnext: autoregressive image and video generation without vector quantisation (NOVA)."""

from diffnext.data import codewithgpu_compat
from diffnext.version import __version__

__all__ = ["__version__"]

codewithgpu_compat.install()  # records can then be written with any version of protobuf
