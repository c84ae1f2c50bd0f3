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
from diffnext.data.caching.errors import BadExample, Skipped, printable
from diffnext.data.caching.geometry import plan_crop
from diffnext.data.caching.items import Item
from diffnext.data.caching.motion import estimate_flow
from diffnext.data.caching.pictures import read_picture
from diffnext.data.caching.provenance import ItemFacts, hash_item, stamp_item
from diffnext.data.caching.settings import CacheSettings, Size
from diffnext.data.caching.video_decoding import read_clips

MAX_BAD_BYTES = 2**26  # hashed of a file that cannot be used, to notice later that it was mended


@dataclass(frozen=True)
class Example:
    """A decoded example.

    Attributes:
        source: Name of its item, and which clip or copy of it.
        pixels: (H, W, 3), or (F, H, W, 3) of a clip, uint8.
        annotation: Its captions, class and flow.
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
    """The result of reading an item.

    Attributes:
        facts: About the item; if it has no example, they say why.
        examples: Several of a video with several clips, and mirrored copies.
    """

    facts: ItemFacts
    examples: Sequence[Example] = ()


def read_item(item: Item, settings: CacheSettings) -> Reading:
    """Decode the examples of an item.

    Args:
        item: Item of the source.
        settings: Settings of the build.
    """
    stamp = stamp_item(item)
    try:
        examples, notes = _read_examples(item, settings)
        digest = hash_item(item)
        if stamp_item(item) == stamp:
            return Reading(ItemFacts(item.name, stamp, digest, notes=notes), examples)
        problem = "was changed while it was read"
    except BadExample as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except MemoryError:
        problem = "needs too much memory to be decoded"
    skipped = Skipped(item.name, printable(problem))
    return Reading(ItemFacts(item.name, stamp, _hash_unchanged(item, stamp), skipped=[skipped]))


def _hash_unchanged(item: Item, stamp: list[Any]) -> str:
    """The hash of an item that cannot be used; empty if that would take long, or it was changed."""
    try:
        digest = hash_item(item, MAX_BAD_BYTES)
    except (BadExample, OSError, MemoryError):
        return ""
    return digest if stamp_item(item) == stamp else ""


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
            plan = functools.partial(plan_crop, settings=settings)
            clips = read_clips(file, settings.frames, plan, settings.decoder)
            endings = [""] if len(clips) == 1 else [f"#{number}" for number in range(len(clips))]
            examples = [
                _make_clip(f"{item.name}{ending}", clip, annotation, settings)
                for ending, clip in zip(endings, clips, strict=True)
            ]
    if settings.flip and not annotation.names_a_side:
        examples = [copy for example in examples for copy in (example, _mirror(example))]
    return examples, notes


def _make_clip(
    source: str, frames: np.ndarray, annotation: Annotation, settings: CacheSettings
) -> Example:
    known = settings.flow if annotation.flow is None else annotation.flow
    return Example(source, frames, annotation, estimate_flow(frames) if known is None else known)


def _mirror(example: Example) -> Example:
    pixels = np.ascontiguousarray(example.pixels[..., ::-1, :])
    return Example(f"{example.source}#mirrored", pixels, example.annotation, example.flow)
