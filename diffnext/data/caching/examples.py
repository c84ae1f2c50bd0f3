"""From an item of the source to its examples: captions read, pixels decoded and brought to size.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffnext.data.caching.captions import Annotation, read_annotation
from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import plan_crop
from diffnext.data.caching.items import Item
from diffnext.data.caching.motion import estimate_flow
from diffnext.data.caching.pictures import read_picture
from diffnext.data.caching.provenance import hash_item, stamp_item
from diffnext.data.caching.settings import CacheSettings, Size
from diffnext.data.caching.video_decoding import read_clips


@dataclass(frozen=True)
class Example:
    """A decoded example.

    Attributes:
        source: Name of its item, and which clip or copy of it.
        pixels: (H, W, 3), or (F, H, W, 3) of a clip, uint8.
        annotation: What is said about it.
        flow: Motion strength of a clip.
    """

    source: str
    pixels: np.ndarray
    annotation: Annotation
    flow: float = 0.0

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.pixels.shape[-3], self.pixels.shape[-2]


@dataclass(frozen=True)
class Reading:
    """What became of an item.

    Attributes:
        stamp: Of the item when it was read.
        hash: Of its content; empty if it has no example.
        examples: Several of a video with several clips, and mirrored copies.
        problem: Why it has none.
        notes: What was assumed about it.
    """

    stamp: list[Any]
    hash: str = ""
    examples: Sequence[Example] = ()
    problem: str | None = None
    notes: Sequence[str] = ()


def read_item(item: Item, settings: CacheSettings) -> Reading:
    """Decode the examples of an item.

    Args:
        item: Of the source.
        settings: Of the build.
    """
    stamp = stamp_item(item)
    try:
        examples, notes = _read_examples(item, settings)
        digest = hash_item(item)
        if stamp_item(item) != stamp:
            raise BadExample("was changed while it was read")
    except BadExample as error:
        return Reading(stamp, problem=str(error))
    except OSError as error:
        return Reading(stamp, problem=f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Reading(stamp, problem="needs too much memory to be decoded")
    return Reading(stamp, digest, examples, notes=notes)


def _read_examples(item: Item, settings: CacheSettings) -> tuple[list[Example], tuple[str, ...]]:
    """The examples, and notes on what was assumed about their pixels."""
    if item.problem is not None or item.media is None:
        raise BadExample(item.problem or "no file")
    annotation = read_annotation(item, settings)
    notes: tuple[str, ...] = ()
    with item.media.open() as file:
        if settings.kind == "images":
            picture = read_picture(file, settings)
            notes = picture.notes
            examples = [Example(item.name, picture.pixels, annotation)]
        else:
            plan = functools.partial(_plan_clip, settings)
            clips = read_clips(file, settings.frames, plan, settings.decoder)
            examples = [
                _make_clip(item, i, clip, annotation, settings) for i, clip in _number(clips)
            ]
    if settings.flip and not annotation.names_a_side:
        examples = [copy for example in examples for copy in (example, _mirror(example))]
    return examples, notes


def _number(clips: list[np.ndarray]) -> list[tuple[int | None, np.ndarray]]:
    """Clips with their numbers; an only one has none."""
    return [(None, clips[0])] if len(clips) == 1 else list(enumerate(clips))


def _plan_clip(settings: CacheSettings, height: int, width: int, pixel_aspect: float) -> Any:
    return plan_crop(height, width, settings, pixel_aspect)


def _make_clip(
    item: Item,
    number: int | None,
    frames: np.ndarray,
    annotation: Annotation,
    settings: CacheSettings,
) -> Example:
    known = annotation.flow if annotation.flow is not None else settings.flow
    flow = estimate_flow(frames) if known is None else known
    source = item.name if number is None else f"{item.name}#{number}"
    return Example(source, frames, annotation, flow)


def _mirror(example: Example) -> Example:
    pixels = np.ascontiguousarray(example.pixels[..., ::-1, :])
    return Example(f"{example.source}#mirrored", pixels, example.annotation, example.flow)
