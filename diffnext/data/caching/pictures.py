"""Pictures: from bytes to pixels of one of the sizes.

Shapes: H W pixels.
"""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import Crop, plan_crop
from diffnext.data.caching.settings import CacheSettings
from diffnext.image_processor import to_rgb
from diffnext.utils.json_files import FileError
from diffnext.utils.pictures import open_picture

ANIMATED = ("PNG", "WEBP", "GIF")  # several pictures in one file mean other things elsewhere
ORIENTATION_TAG = 0x0112
ON_THE_SIDE = (5, 6, 7, 8)  # orientations that swap width and height
DRAFT_MARGIN = 2  # JPEGs are decoded at no less than this times the size they are scaled to


def read_picture(file: BinaryIO, settings: CacheSettings) -> np.ndarray:
    """Decode a picture and bring it to the size of the nearest aspect.

    The EXIF orientation is applied, transparency laid on white, other colour models made RGB.

    Args:
        file: Open file.
        settings: Of the build.

    Returns:
        (H, W, 3), uint8.

    Raises:
        BadExample: If it is not a picture, damaged, animated, or of an unsuitable size.
    """
    try:
        with open_picture(file) as picture:
            return _fit(picture, settings)
    except BadExample:
        raise
    except FileError as error:
        raise BadExample(str(error)) from error
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise BadExample(f"cannot be decoded: {error or type(error).__name__}") from error


def _fit(picture: Image.Image, settings: CacheSettings) -> np.ndarray:
    frames = getattr(picture, "n_frames", 1)
    if picture.format in ANIMATED and frames > 1:
        raise BadExample(f"is animated, with {frames} frames")
    orientation = _orientation(picture)
    width, height = reversed(picture.size) if orientation in ON_THE_SIDE else picture.size
    crop = plan_crop(height, width, settings)
    if picture.format == "JPEG":
        _decode_smaller(picture, max(crop.scaled[0] / height, crop.scaled[1] / width))
    upright = picture if orientation == 1 else ImageOps.exif_transpose(picture)
    return np.asarray(scale_and_cut(to_rgb(upright), crop))


def scale_and_cut(picture: Image.Image, crop: Crop) -> Image.Image:
    """Scale a picture with Lanczos filtering and cut it, in one step."""
    height, width = crop.size
    if picture.size == (width, height) == crop.scaled[::-1]:
        return picture
    x_step = picture.width / crop.scaled[1]
    y_step = picture.height / crop.scaled[0]
    left, top = crop.left * x_step, crop.top * y_step
    box = (left, top, left + width * x_step, top + height * y_step)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _decode_smaller(picture: Image.Image, scale: float) -> None:
    """Let the JPEG decoder halve the picture as often as the margin allows."""
    factor = DRAFT_MARGIN * scale
    if factor < 1:
        wanted = (math.ceil(picture.width * factor), math.ceil(picture.height * factor))
        picture.draft(picture.mode, wanted)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8; damaged metadata leave a picture upright."""
    try:
        return picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # as varied as the damages
        return 1
