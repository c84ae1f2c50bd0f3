"""Videos: from bytes to clips of one of the sizes, by PyAV or decord.

Shapes: F frames of a clip, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.geometry import Crop
from diffnext.data.caching.pictures import scale_and_cut
from diffnext.data.caching.settings import FrameSampling

Payload = TypeVar("Payload")
PlanCrop = Callable[[int, int, float], Crop]  # of height, width and pixel aspect

# Not all that FFmpeg reads: lists of other files, for one, could name any place.
CONTAINERS = "mov,matroska,webm,avi,gif,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,h264,hevc"
USUAL_RATE = 25  # where a file tells no frame rate


def read_clips(
    file: BinaryIO, sampling: FrameSampling, plan: PlanCrop, decoder: str = "pyav"
) -> list[np.ndarray]:
    """Decode the clips of a video.

    Frame k of the first clip is the one that is shown k steps after the first frame; a step is
    ``sampling.stride`` mean frame durations, or one over ``sampling.fps`` seconds: a constant rate
    gives every ``stride``-th frame, a varying one the picture of that moment. Videos are turned
    upright, and pixels made square.

    Args:
        file: Open video, seekable.
        sampling: Which frames.
        plan: Says from height and width of the upright video and the aspect of its pixels what is
            kept; it may raise BadExample.
        decoder: "pyav" or "decord".

    Returns:
        One or more clips, (F, H, W, 3), uint8.

    Raises:
        BadExample: If it is not a video, is damaged, has no frames or not enough of them.
        CacheError: If the decoder is not installed.
    """
    frames = (_read_pyav if decoder == "pyav" else _read_decord)(file, sampling, plan)
    clips: list[np.ndarray] = []
    while clip := list(itertools.islice(frames, sampling.num_frames)):
        if len(clip) < sampling.num_frames:
            clip = [] if clips else _extend(clip, sampling)
        if clip:
            clips.append(np.stack(clip))
    if not clips:
        raise BadExample("has no frames")
    return clips


def pick_frames(
    frames: Iterable[tuple[float, float, Payload]], step: float, period: float, count: int
) -> Iterator[Payload]:
    """The frames that are shown at 0, step, 2 step, ... after the first.

    A frame counts as shown from the middle between it and the one before it, but not more than half
    a period before its time. The only frame of a video is a picture, however long it is shown.

    Args:
        frames: Start and end in seconds, and anything that stands for the frame, in order.
        step: Seconds.
        period: Mean duration of a frame, seconds.
        count: Frames wanted.

    Yields:
        At most ``count`` frames; fewer if the last one ends before.
    """
    shown: tuple[float, float, Payload] | None = None
    first = 0.0
    number = 0
    for frame in frames:
        if shown is None:
            first = frame[0]
        else:
            change = frame[0] - min(period, frame[0] - shown[0]) / 2
            while first + number * step < change:
                yield shown[2]
                number += 1
                if number == count:
                    return
        shown = frame
    if shown is None:
        return
    start, end, payload = shown
    end = min(end, start + period) if start == first else end
    change = end - min(period, end - start) / 2
    while number < count and first + number * step < change:
        yield payload
        number += 1


def _extend(clip: list[np.ndarray], sampling: FrameSampling) -> list[np.ndarray]:
    """Hold the last frame of a clip that is too short, where that is wanted."""
    missing = sampling.num_frames - len(clip)
    if sampling.short == "hold":
        return clip + clip[-1:] * missing
    step = f"{sampling.fps:g} per second" if sampling.fps else f"a stride of {sampling.stride}"
    raise BadExample(f"is too short: {len(clip)} of {sampling.num_frames} frames at {step}")


def _step(sampling: FrameSampling, period: float) -> float:
    return 1 / sampling.fps if sampling.fps else sampling.stride * period


def _read_pyav(file: BinaryIO, sampling: FrameSampling, plan: PlanCrop) -> Iterator[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise CacheError("videos are decoded with PyAV: `pip install av`") from error
    try:
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise BadExample("has no stream of pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            period = 1 / float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
            times = _pyav_times(container.decode(stream), period)
            count = sampling.num_frames * sampling.clips
            fit = _PyavFit(plan)
            for frame in pick_frames(times, _step(sampling, period), period, count):
                yield fit(frame)
    except (BadExample, GeneratorExit):
        raise
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadExample(f"cannot be decoded: {message}") from error


def _pyav_times(frames: Iterable[Any], period: float) -> Iterator[tuple[float, float, Any]]:
    """Frames with start and end; without time stamps one per period."""
    for number, frame in enumerate(frames):
        if frame.is_corrupt:
            raise BadExample(f"is damaged at frame {number}")
        start = number * period if frame.time is None else frame.time
        duration = float((frame.duration or 0) * (frame.time_base or 0))
        yield start, start + (duration or period), frame


class _PyavFit:
    """Brings decoded frames to the size that is planned for the first.

    Args:
        plan: See :func:`read_clips`.
    """

    def __init__(self, plan: PlanCrop) -> None:
        self._plan = plan
        self._crop: Crop | None = None
        self._layout: tuple[int, int, int] | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        """(H, W, 3), uint8, upright."""
        turns = round(frame.rotation / 90) % 4  # to the left
        layout = (frame.height, frame.width, turns)
        if self._crop is None:
            self._layout = layout
            self._crop = self._plan_crop(frame, turns)
        if layout != self._layout:
            raise BadExample("changes its size on the way")
        height, width = self._crop.scaled[::-1] if turns % 2 else self._crop.scaled
        pixels = frame.to_ndarray(
            format="rgb24", width=width, height=height, interpolation="BICUBIC"
        )
        top, left = self._crop.top, self._crop.left
        height, width = self._crop.size
        return np.rot90(pixels, turns)[top : top + height, left : left + width]

    def _plan_crop(self, frame: Any, turns: int) -> Crop:
        aspect = float(getattr(frame, "sample_aspect_ratio", None) or 1)
        if turns % 2:
            return self._plan(frame.width, frame.height, 1 / aspect)
        return self._plan(frame.height, frame.width, aspect)


def _read_decord(file: BinaryIO, sampling: FrameSampling, plan: PlanCrop) -> Iterator[np.ndarray]:
    try:
        import decord
    except ImportError as error:
        raise CacheError("decord is not installed: `pip install decord`") from error
    try:
        reader = decord.VideoReader(file, num_threads=1)
        times = reader.get_frame_timestamp(range(len(reader))).tolist()
        period = 1 / (reader.get_avg_fps() or USUAL_RATE)
        frames = [(start, end, index) for index, (start, end) in enumerate(times)]
        count = sampling.num_frames * sampling.clips
        chosen = list(pick_frames(frames, _step(sampling, period), period, count))
        pixels = reader.get_batch(chosen).asnumpy() if chosen else np.empty((0, 0, 0, 3))
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise BadExample(f"cannot be decoded: {message[0]}") from error
    if len(pixels):
        crop = plan(pixels.shape[1], pixels.shape[2], 1.0)
    for picture in pixels:
        yield np.asarray(scale_and_cut(Image.fromarray(picture), crop))
