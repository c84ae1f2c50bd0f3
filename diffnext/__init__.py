"""diffnext: autoregressive image and video generation without vector quantisation (NOVA)."""

from diffnext.version import __version__

__all__ = ["__version__"]
