"""Helpers shared by all packages; this package imports none of them.

What it exports is imported when it is asked for: the words of a command's --help need no numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffnext.utils.export_utils import export_to_image, export_to_video
    from diffnext.utils.file_parameters import read_parameters

__all__ = ["export_to_image", "export_to_video", "read_parameters"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "file_parameters" if name == "read_parameters" else "export_utils"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
