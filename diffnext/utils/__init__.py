"""Helpers shared by all packages; this package imports none of them."""

from diffnext.utils.export_utils import export_to_image, export_to_video

__all__ = ["export_to_image", "export_to_video"]
