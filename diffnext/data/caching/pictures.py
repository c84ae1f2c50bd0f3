"""Pictures: from bytes to pixels of one of the sizes.

Shapes: H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from diffnext.data.caching.colours import read_exif, to_srgb
from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import Crop, check_pixels, plan_crop
from diffnext.data.caching.settings import CacheSettings
from diffnext.utils.json_files import FileError
from diffnext.utils.pictures import open_picture

ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")  # in others, several pictures mean other things
TURNS = {  # that set pictures of an orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_THE_SIDE = (5, 6, 7, 8)  # orientations that swap width and height
DRAFT_MARGIN = 2  # JPEGs are decoded at no less than this times the size they are scaled to
HEAD = 2**16  # bytes of a file in which its colours are named
TIFF_MARKS = (b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: (H, W, 3), uint8.
        notes: What was assumed about it.
    """

    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def read_picture(file: BinaryIO, settings: CacheSettings) -> Picture:
    """Decode a picture and bring it to the size of the nearest aspect.

    The EXIF orientation is applied, and transparency laid on white. Colours become sRGB, by the
    profile of the picture and the sample format that its file names.

    Args:
        file: Open file.
        settings: Settings of the build.

    Raises:
        BadExample: If it is not a picture, damaged, animated, or of an unsuitable size, or if its
            range of values is not known.
    """
    head = file.read(HEAD)
    file.seek(0)
    try:
        _verify(file, settings)
        with open_picture(file) as picture:
            return _fit(picture, head, settings)
    except (BadExample, MemoryError):
        raise
    except FileError as error:
        if head.startswith(TIFF_MARKS) and "known format" in str(error):
            raise BadExample("is a TIFF of a kind that Pillow does not read") from error
        raise BadExample(str(error)) from error
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise BadExample(f"cannot be decoded: {error or type(error).__name__}") from error


def _verify(file: BinaryIO, settings: CacheSettings) -> None:
    """Compare a PNG with its checksums; decoding would take damaged bytes for colours."""
    with open_picture(file) as picture:
        check_pixels(picture.height, picture.width, settings)
        if picture.format == "PNG":
            picture.verify()
    file.seek(0)


def _fit(picture: Image.Image, head: bytes, settings: CacheSettings) -> Picture:
    frames = getattr(picture, "n_frames", 1)
    if picture.format in ANIMATED and frames > 1:
        raise BadExample(f"is animated, with {frames} frames")
    # Pillow turns TIFFs by itself.
    orientation = (
        None if picture.format == "TIFF" else read_exif(picture, ExifTags.Base.Orientation)
    )
    width, height = reversed(picture.size) if orientation in ON_THE_SIDE else picture.size
    crop = plan_crop(height, width, settings=settings)
    if picture.format == "JPEG":
        _decode_smaller(picture, max(crop.scaled[0] / height, crop.scaled[1] / width))
    upright, notes = to_srgb(picture, head)
    if orientation in TURNS:
        upright = upright.transpose(TURNS[orientation])
    return Picture(np.asarray(scale_and_cut(upright, crop)), notes)


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
