"""Frames as PyAV decodes them, made progressive, opaque, upright and of usual colours.

Shapes: H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from diffnext.data.caching.errors import BadExample
from diffnext.data.caching.geometry import Crop

PlanCrop = Callable[[int, int, float], Crop]  # of height, width and pixel aspect

# Numbers of ITU-T H.273, as containers store them.
MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)  # that can be converted; 8 is YCgCo, 14 ICtCp
WIDE_PRIMARIES = (9, 11, 12)  # BT.2020, P3
HDR_TRANSFERS = (16, 18)  # PQ, HLG

# Flags of FFmpeg's scaler: bicubic, colours of every pixel by themselves, exact rounding.
SCALING = 0x4 | 0x2000 | 0x4000 | 0x40000
SCALING_NAMES = "bicubic+full_chroma_int+full_chroma_inp+accurate_rnd"

DEINTERLACING = ("bwdif", "mode=send_frame:deint=interlaced:threads=1")


def is_wide(frame: Any) -> bool:
    """Whether a frame is coded for more colours or more light than usual screens have."""
    return frame.color_primaries in WIDE_PRIMARIES or frame.color_trc in HDR_TRANSFERS


def has_alpha(frame: Any) -> bool:
    """Whether a frame may be transparent."""
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def deinterlace(frames: Iterable[Any]) -> Iterator[Any]:
    """Frames of one layout; those that are flagged as interlaced become progressive."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _make_graph(_describe(frame), DEINTERLACING)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pull(graph)
    if graph is not None:
        graph.push(None)
        yield from _pull(graph)


class FrameFitter:
    """Brings frames to the size that is planned for the first.

    Args:
        plan: Plans the crop from height and width of the upright frame and the aspect of its
            pixels; it may raise BadExample.
        pixel_aspect: Width of a stored pixel by its height.
    """

    def __init__(self, plan: PlanCrop, pixel_aspect: float) -> None:
        self._plan = plan
        self._pixel_aspect = pixel_aspect
        self._crop: Crop | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        """Scale, turn and cut a frame.

        Returns:
            (H, W, 3), uint8.

        Raises:
            BadExample: If its colours cannot be converted.
        """
        turns = quarter_turns(frame)
        if self._crop is None:
            self._crop = self._plan_crop(frame, turns)
        height, width = self._crop.scaled[::-1] if turns % 2 else self._crop.scaled
        stored = self._scale(frame, height, width)
        pixels = np.rot90(stored[::-1] if is_mirrored(frame) else stored, turns)
        top, left = self._crop.top, self._crop.left
        height, width = self._crop.size
        return pixels[top : top + height, left : left + width]

    def _plan_crop(self, frame: Any, turns: int) -> Crop:
        if turns % 2:
            return self._plan(frame.width, frame.height, 1 / self._pixel_aspect)
        return self._plan(frame.height, frame.width, self._pixel_aspect)

    def _scale(self, frame: Any, height: int, width: int) -> np.ndarray:
        """RGB of a frame that is not turned yet, (height, width, 3)."""
        if frame.colorspace not in MATRICES:
            raise BadExample(f"its colours cannot be converted (matrix {frame.colorspace})")
        if has_alpha(frame):
            frame = _lay_on_white(frame)
        elif is_wide(frame):
            frame = self._convert_wide(frame, height, width)
        return frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=SCALING)

    def _convert_wide(self, frame: Any, height: int, width: int) -> Any:
        """A frame in the colours of BT.709, scaled; of HDR with a tone curve."""
        intent = "perceptual" if frame.color_trc in HDR_TRANSFERS else "relative_colorimetric"
        options = f"w={width}:h={height}:flags={SCALING_NAMES}:threads=1:intent={intent}"
        scaling = ("scale", f"{options}:out_primaries=bt709:out_transfer=bt709")
        graph = _reuse_graph(_describe(frame), scaling, ("format", "rgb24"))
        graph.push(frame)
        return next(_pull(graph))


def quarter_turns(frame: Any) -> int:
    """Quarter turns to the left, 0 to 3, that set a frame upright."""
    return round(frame.rotation / 90) % 4


def is_mirrored(frame: Any) -> bool:
    """Whether a frame is turned upside down before it is turned upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a * d < b * c


def _lay_on_white(frame: Any) -> Any:
    """A frame without transparency, whose hidden colours are gone before it is scaled."""
    pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
    opacity = pixels[..., 3:]
    opaque = (pixels[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255
    return type(frame).from_ndarray(opaque.astype(np.uint8), format="rgb24")


def _describe(frame: Any) -> str:
    """A frame as the first filter of a graph expects it."""
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
        f":time_base={frame.time_base}:colorspace={frame.colorspace}:range={frame.color_range}"
    )


def _make_graph(source: str, *filters: tuple[str, str]) -> Any:
    """Filters of FFmpeg, name and options of each, one after the other."""
    from av.filter import Graph

    graph = Graph()
    nodes = [graph.add(*node) for node in (("buffer", source), *filters, ("buffersink", ""))]
    graph.link_nodes(*nodes).configure()
    return graph


# Its tables of colours take seconds to compute, and videos of one camera share them.
_reuse_graph = functools.lru_cache(maxsize=4)(_make_graph)


def _pull(graph: Any) -> Iterator[Any]:
    """The frames that a graph has ready."""
    while True:
        try:
            frame = graph.pull()
        except (BlockingIOError, EOFError):
            return
        yield frame
