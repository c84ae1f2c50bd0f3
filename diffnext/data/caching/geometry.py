"""Sizes: which one an example gets, and which part of it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.settings import CacheSettings, Size

SIDE_UNIT = 32  # pixels that a token of the video encoder covers in small models; 64 in large ones


@dataclass(frozen=True)
class Crop:
    """How a picture is brought to a size.

    Attributes:
        size: (height, width) of the result.
        scaled: (height, width) of the whole picture before it is cut.
        top: First row of the scaled picture that is kept.
        left: First column.
    """

    size: Size
    scaled: Size
    top: int
    left: int


def bucket_sizes(side: int) -> tuple[Size, ...]:
    """Sizes of many aspects and nearly the same number of pixels, from 1:2 to 2:1.

    Their sides are multiples of the pixels that a token of the video encoder covers: 32, from 512
    on 64, from 1536 on 128 and so on. 1024 gives 704x1408, 768x1344, 832x1280, 896x1152, 960x1088,
    1024x1024 and the upright ones.

    Args:
        side: Side of the square size in pixels; rounded to such a multiple.

    Returns:
        (height, width) of each, the widest first.

    Raises:
        CacheError: If the side is less than 64 pixels.
    """
    if side < 2 * SIDE_UNIT:
        raise CacheError(f"buckets must be at least {2 * SIDE_UNIT} pixels, got {side}")
    step = SIDE_UNIT if side < 16 * SIDE_UNIT else 2 * SIDE_UNIT * max(1, round(side / 1024))
    square = round(side / step)  # in steps, as all that follow
    heights = range(round(square / math.sqrt(2)), square)
    wide = [(height, min(round(square**2 / height), 2 * height)) for height in heights]
    upright = [(width, height) for height, width in reversed(wide)]
    return tuple((h * step, w * step) for h, w in [*wide, (square, square), *upright])


def nearest_size(height: float, width: float, sizes: Sequence[Size]) -> Size:
    """The size of the nearest aspect, measured by the ratio of aspects; the first of equals."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def check_pixels(height: int, width: int, settings: CacheSettings) -> None:
    """Reject a picture without pixels, or with more than the build decodes.

    Raises:
        BadExample: If it is one.
    """
    if height < 1 or width < 1:
        raise BadExample(f"is {height}x{width} pixels")
    if height * width > settings.max_pixels:
        raise BadExample(f"is {height}x{width} pixels, more than {settings.max_pixels}")


def plan_crop(height: int, width: int, pixel_aspect: float = 1, *, settings: CacheSettings) -> Crop:
    """Choose the size of a picture, and the part that is kept.

    Args:
        height: Height of the picture.
        width: Width of the picture.
        pixel_aspect: Width of a pixel by its height.
        settings: Settings of the build: ``sizes``, ``resize``, ``max_upscale`` and ``max_pixels``.

    Raises:
        BadExample: If the picture is too large or too small.
    """
    check_pixels(height, width, settings)
    size = nearest_size(height, width * pixel_aspect, settings.sizes)
    factors = (size[0] / height, size[1] / (width * pixel_aspect))
    if max(factors) > settings.max_upscale:
        raise BadExample(
            f"is {height}x{width} pixels: {size[0]}x{size[1]} would enlarge it more than "
            f"{settings.max_upscale:g} times"
        )
    if settings.resize == "stretch":
        return Crop(size, size, 0, 0)
    scale = max(factors)
    scaled = (
        max(size[0], round(height * scale)),
        max(size[1], round(width * pixel_aspect * scale)),
    )
    return Crop(size, scaled, (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)
