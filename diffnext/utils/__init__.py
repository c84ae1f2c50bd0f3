"""Helpers shared by all packages; this package imports none of them."""

from diffnext.utils.export_utils import export_to_image, export_to_video
from diffnext.utils.file_parameters import read_parameters

__all__ = ["export_to_image", "export_to_video", "read_parameters"]
