"""Pictures from files that may come from a stranger."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffnext.utils.json_files import FileError

__all__ = ["FORMATS", "known_formats", "lay_on_white", "load_picture", "open_picture", "to_rgb"]

# Not every format of PIL: PostScript, for one, would start another program. The last two need
# plug-ins: pillow-heif and pillow-jxl-plugin.
FORMATS = ("JPEG MPO PNG WEBP BMP GIF TIFF PPM JPEG2000 AVIF HEIF JXL").split()


def open_picture(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open a picture in one of the :data:`FORMATS`; its pixels are decoded when they are used.

    Args:
        file: Its path, or the open file.

    Returns:
        The picture, to be closed like any that PIL opens.

    Raises:
        FileError: If it is not such a picture, or has so many pixels that they may not fit in
            memory. The message names the path if there is one.
        OSError: If there is no such file.
    """
    with _decoding(file):
        return Image.open(file, formats=known_formats())


def load_picture(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Read a picture whole; see :func:`open_picture`.

    Raises:
        FileError: As for :func:`open_picture`, or if it is damaged.
        OSError: If there is no such file.
    """
    with _decoding(file), open_picture(file) as picture:
        return picture.copy()


def to_rgb(picture: Image.Image, name: str = "image") -> Image.Image:
    """A PIL image without transparency, palettes or other colour models.

    Raises:
        ValueError: If values of a mode with more than 8 bits are outside of its range.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        white = 255 if picture.mode == "F" else 65535
        values = np.array(picture, np.float32)
        if not ((values >= 0) & (values <= white)).all():
            got = f"values from {values.min():g} to {values.max():g}"
            raise ValueError(f"{name} must be 0 to {white} in mode {picture.mode}, got {got}")
        picture = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return lay_on_white(picture.convert("RGB"), picture.getchannel("A"))


def lay_on_white(picture: Image.Image, opacity: Image.Image) -> Image.Image:
    """A picture in mode RGB as it looks on white paper, by its opacity in mode L."""
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=opacity)
    return paper


@contextmanager
def _decoding(file: str | os.PathLike[str] | BinaryIO) -> Iterator[None]:
    name = f"{file} " if isinstance(file, str | os.PathLike) else ""
    try:
        yield
    except FileError:
        raise
    except UnidentifiedImageError as error:
        raise FileError(f"{name}is not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise FileError(f"{name}has too many pixels: {error}") from error
    except Exception as error:  # decoders of damaged files raise errors of many types
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise FileError(f"{name}cannot be decoded: {reason}") from error


@functools.cache
def known_formats() -> list[str]:
    """The formats that PIL can read here, with the plug-ins that are installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 - registers itself
    return [name for name in FORMATS if name in Image.OPEN]
