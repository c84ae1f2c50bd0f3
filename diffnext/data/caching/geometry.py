"""Sizes: which one an example gets, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.settings import CacheSettings, Size


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


def nearest_size(height: float, width: float, sizes: Sequence[Size]) -> Size:
    """The size of the nearest aspect, measured by the ratio of aspects; the first of equals."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def plan_crop(height: int, width: int, settings: CacheSettings, pixel_aspect: float = 1) -> Crop:
    """Choose the size of a picture, and what is kept.

    Args:
        height: Of the picture.
        width: Of the picture.
        settings: Of the build: ``sizes``, ``resize``, ``max_upscale`` and ``max_pixels``.
        pixel_aspect: Width of a pixel by its height.

    Raises:
        BadExample: If the picture is too large or too small.
    """
    if height < 1 or width < 1:
        raise BadExample(f"is {height}x{width} pixels")
    if height * width > settings.max_pixels:
        raise BadExample(f"is {height}x{width} pixels, more than {settings.max_pixels}")
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
