"""From an item of the source to the records of its examples.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffnext.data.caching.captions import Annotation, read_annotation
from diffnext.data.caching.encoding import LatentEncoder, TextStates, pack_states
from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import plan_crop
from diffnext.data.caching.items import Item
from diffnext.data.caching.motion import estimate_flow
from diffnext.data.caching.pictures import read_picture
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
class Skipped:
    """What is not in the dataset, and why."""

    source: str
    reason: str


def read_item(item: Item, settings: CacheSettings) -> list[Example] | Skipped:
    """Decode the examples of an item.

    Args:
        item: Of the source.
        settings: Of the build.

    Returns:
        Its examples: several of a video with several clips, and mirrored copies; or the reason why
        it has none.
    """
    try:
        return _read_examples(item, settings)
    except BadExample as error:
        return Skipped(item.name, str(error))


def _read_examples(item: Item, settings: CacheSettings) -> list[Example]:
    if item.problem is not None or item.media is None:
        raise BadExample(item.problem or "no file")
    annotation = read_annotation(item, settings)
    with item.media.open() as file:
        if settings.kind == "images":
            examples = [Example(item.name, read_picture(file, settings), annotation)]
        else:
            plan = functools.partial(_plan_clip, settings)
            clips = read_clips(file, settings.frames, plan, settings.decoder)
            examples = [
                _make_clip(item, i, clip, annotation, settings) for i, clip in _number(clips)
            ]
    if settings.flip and not annotation.names_a_side:
        examples = [copy for example in examples for copy in (example, _mirror(example))]
    return examples


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


def record_features(settings: CacheSettings) -> dict[str, Any]:
    """The descriptor of the records of a build."""
    text = "string" if settings.text_encoder is None else {"data": "bytes", "shape": ["int64"]}
    captions = {"label": "int64"} if settings.labels else {"caption": text, "text": text}
    flow = {"flow": "float64"} if settings.kind == "videos" else {}
    return {"moments": "bytes", **captions, "shape": ["int64"], **flow, "source": "string"}


def make_records(
    examples: Sequence[Example],
    settings: CacheSettings,
    encoder: LatentEncoder,
    text_states: TextStates | None,
) -> list[dict[str, Any] | Skipped]:
    """Encode a batch of examples of one size.

    Args:
        examples: Decoded examples.
        settings: Of the build.
        encoder: Autoencoder.
        text_states: Text encoder, or None to store the captions themselves.

    Returns:
        For each example its record, or the reason why it has none.
    """
    latents = encoder.encode([example.pixels for example in examples])
    captions = _make_captions(examples, settings, text_states)
    records: list[dict[str, Any] | Skipped] = []
    for example, moments, texts in zip(examples, latents, captions, strict=True):
        if not np.isfinite(moments).all():
            reason = f"its latents are not finite when they are computed in {settings.dtype}"
            records.append(Skipped(example.source, reason))
            continue
        flow = {"flow": example.flow} if settings.kind == "videos" else {}
        shape = list(moments.shape)
        record = {"moments": moments.tobytes(), **texts, "shape": shape, **flow}
        records.append({**record, "source": example.source})
    return records


def _make_captions(
    examples: Sequence[Example], settings: CacheSettings, text_states: TextStates | None
) -> list[dict[str, Any]]:
    annotations = [example.annotation for example in examples]
    if settings.labels:
        return [{"label": annotation.label} for annotation in annotations]
    if text_states is None:
        return [{"caption": a.caption, "text": a.text} for a in annotations]
    # As training would choose between texts, it chooses between states.
    texts = [text for a in annotations for text in (a.caption, a.short_caption)]
    states = text_states.encode(texts)
    return [
        {
            "caption": pack_states(states[2 * i]),
            "text": pack_states(states[2 * i + 1] if annotation.short_caption else None),
        }
        for i, annotation in enumerate(annotations)
    ]
