"""Colours of pictures: from the samples of a file to sRGB.

Shapes: H W pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from diffnext.data.caching.errors import BadExample
from diffnext.utils.pictures import lay_on_white

BAD_PROFILE = "taken for sRGB: the colour profile cannot be used"
NO_PROFILE = "taken for sRGB: other colours without a colour profile"
NO_SPACE = "taken for sRGB: the file names no colour space"
HDR = "taken for SDR: brightness coded for HDR (PQ or HLG)"

# Tags of TIFF, and their values.
BITS, PHOTOMETRIC, SAMPLE_FORMAT, SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE = 258, 262, 339, 340, 341
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO = 0
COLOR_MAP = 320

CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000, without the file around it that names colours

EXIF_SRGB = 1
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
SRGB_GAMMA, GAMMA_TOLERANCE = 1 / 2.2, 0.05
PNG_BITS = 24  # place of the number of bits in a PNG
# The bytes before the numbers of colours in some formats, and bytes of each number.
CODING_MARKS = {
    "PNG": (b"\0\0\0\4cICP", 1),
    "AVIF": (b"colrnclx", 2),
    "HEIF": (b"colrnclx", 2),
}
# Such numbers, of ITU-T H.273.
BT709, UNSPECIFIED = 1, 2  # primaries; 2 also of transfer functions
HDR_TRANSFERS = (16, 18)  # PQ, HLG


def to_srgb(picture: Image.Image, head: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert colours to sRGB and lay transparency on white.

    Args:
        picture: A picture that Pillow opened.
        head: First bytes of its file.

    Returns:
        A picture in mode RGB, and notes on what was assumed.

    Raises:
        BadExample: If black and white, the channels or the transparent colour are unknown.
    """
    if head.startswith(CODESTREAM) and picture.mode == "RGBA":
        raise BadExample("is a JPEG 2000 codestream of four channels, CMYK or with transparency")
    profile = picture.info.get("icc_profile")
    note = None if profile else _name_other_colours(picture, head)
    picture, opacity = _split_opacity(_to_eight_bits(picture, head))
    if profile and picture.mode != "LAB":
        transform = _find_transform(profile, picture.mode)
        note = BAD_PROFILE if transform is None else None
        picture = picture if transform is None else transform(picture)
    picture = picture.convert("RGB")
    if opacity is not None:
        picture = lay_on_white(picture, opacity)
    return picture, () if note is None else (note,)


def read_exif(picture: Image.Image, tag: int, folder: int | None = None) -> Any:
    """A tag of EXIF, of one of its folders if it is named; None if it is absent or damaged."""
    try:
        exif = picture.getexif()
        return (exif if folder is None else exif.get_ifd(folder)).get(tag)
    except Exception:  # Pillow raises errors of any type on damaged files
        return None


def _to_eight_bits(picture: Image.Image, head: bytes) -> Image.Image:
    """A picture of 8 bits per channel at most, black at 0 and white at the highest value."""
    tags = getattr(picture, "tag_v2", {})
    if picture.mode.startswith("P") and max(tags.get(COLOR_MAP, [256])) < 256:
        # 8-bit colours in place of 16-bit ones: libtiff takes them for such, too
        picture.putpalette(bytes(tags[COLOR_MAP]), "RGB;L")
    sample_format = _first(tags, SAMPLE_FORMAT, FLOAT if picture.mode == "F" else UNSIGNED)
    bits = _first(tags, BITS, 16)
    ranges = {UNSIGNED: (0, 2**bits - 1), SIGNED: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)}
    low, high = ranges.get(sample_format, (0, 1))
    black, white = _first(tags, SMIN_SAMPLE_VALUE, low), _first(tags, SMAX_SAMPLE_VALUE, high)
    key = picture.info.get("transparency")
    if picture.mode[0] not in "IF" and sample_format == UNSIGNED:
        if bits > 8 and (black, white) != (low, high):
            raise BadExample(f"its {bits}-bit colours from {black:g} to {white:g} cannot be scaled")
        if picture.format == "PNG" and key is not None:
            picture.info["transparency"] = _scale_key(picture.mode, head[PNG_BITS], key)
        return picture
    values = np.asarray(picture)
    if picture.mode == "I" and sample_format == UNSIGNED:
        values = values.view(np.uint32)
    if picture.mode == "L":
        values = values.view(np.int8)
    if not black < white:
        raise BadExample(f"names {black:g} as black and {white:g} as white")
    if not ((values >= black) & (values <= white)).all():
        raise BadExample(
            f"holds values from {values.min():g} to {values.max():g}, but black and white are "
            f"{black:g} and {white:g} unless SMinSampleValue and SMaxSampleValue name others"
        )
    if _first(tags, PHOTOMETRIC, None) == WHITE_IS_ZERO:
        black, white = white, black
    levels = values.astype(np.float32)  # in place from here on: pictures may be large
    levels -= black
    levels *= 255 / (white - black)
    grey = Image.fromarray(np.rint(levels, out=levels).astype(np.uint8))
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _first(tags: Any, tag: int, default: Any) -> Any:
    """The first value of a tag of TIFF."""
    return np.ravel(tags.get(tag, default))[0]


def _scale_key(mode: str, bits: int, key: Any) -> Any:
    """The transparent colour of a PNG at 8 bits; Pillow converts only the pixels."""
    if mode == "L":
        return key * 255 // (2**bits - 1)
    if mode == "RGB" and bits > 8:
        raise BadExample(f"its {bits}-bit colours, one of them transparent, cannot be scaled")
    return key


def _split_opacity(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, hidden ones included, and the opacity if there is any."""
    if not picture.has_transparency_data:
        return picture, None
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    return picture.convert(mode), picture.getchannel("A")


@functools.lru_cache(maxsize=16)  # many pictures of one source have the same
def _find_transform(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """The way from a profile to sRGB; None if it is damaged or not for pictures of the mode."""
    modes = {"CMYK": ("CMYK",), "L": ("L", "RGB"), "1": ("L", "RGB")}.get(mode, ("RGB",))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        source_mode = PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if source_mode not in modes:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            source_mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    return lambda picture: transform.apply(picture.convert(source_mode))


def _name_other_colours(picture: Image.Image, head: bytes) -> str | None:
    """A note on a picture without a profile that names other colours than sRGB's."""
    primaries, transfer = _read_coding(picture.format, head)
    if transfer in HDR_TRANSFERS:
        return HDR
    if head.startswith(CODESTREAM) and picture.mode == "RGB":
        return NO_SPACE
    gamma = picture.info.get("gamma", SRGB_GAMMA) if "srgb" not in picture.info else SRGB_GAMMA
    colour_space = read_exif(picture, ExifTags.Base.ColorSpace, ExifTags.IFD.Exif)
    is_other = (
        picture.mode == "CMYK"
        or primaries not in (BT709, UNSPECIFIED)
        or colour_space not in (None, EXIF_SRGB)
        or abs(gamma / SRGB_GAMMA - 1) > GAMMA_TOLERANCE
    )
    return NO_PROFILE if is_other else None


def _read_coding(format_name: str | None, head: bytes) -> tuple[int, int]:
    """Primaries and transfer function that a file names; unspecified ones if it names none."""
    mark, width = CODING_MARKS.get(format_name or "", (b"", 0))
    place = head.find(mark)
    if not mark or place < 0:
        return UNSPECIFIED, UNSPECIFIED
    codes = head[place + len(mark) :]
    return int.from_bytes(codes[:width], "big"), int.from_bytes(codes[width : 2 * width], "big")
