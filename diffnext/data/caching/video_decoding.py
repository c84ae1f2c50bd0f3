"""Videos: from bytes to clips of one of the sizes, by PyAV or decord.

Shapes: F frames of a clip, H W pixels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from diffnext.data.caching.errors import BadExample, CacheError
from diffnext.data.caching.pictures import scale_and_cut
from diffnext.data.caching.settings import FrameSampling
from diffnext.data.caching.video_frames import (
    FrameFitter,
    PlanCrop,
    deinterlace,
    has_alpha,
    is_mirrored,
    is_wide,
    quarter_turns,
)

Payload = TypeVar("Payload")

# Not all that FFmpeg reads: lists of other files, for one, could name any place.
CONTAINERS = "mov,matroska,webm,avi,gif,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,h264,hevc"
SURE_FOR_DECORD = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave transparency out
DECORD_PLACES = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # times and lines of decord's errors
USUAL_RATE = 25  # where a file names no frame rate


def read_clips(
    file: BinaryIO, sampling: FrameSampling, plan: PlanCrop, decoder: str = "pyav"
) -> list[np.ndarray]:
    """Decode the clips of a video.

    Frame k of the first clip is the one that is shown k steps after the first frame. A step is
    ``sampling.stride`` mean frame durations, or ``1 / sampling.fps`` seconds. So a constant rate
    gives every ``stride``-th frame, and a varying one the picture of that moment. Frames are turned
    upright, deinterlaced, laid on white where they are transparent, and converted to sRGB with
    square pixels; HDR gets a tone curve.

    Args:
        file: Open video, seekable.
        sampling: Which frames.
        plan: Plans the crop from height and width of the upright video and the aspect of its
            pixels; it may raise BadExample.
        decoder: "pyav" or "decord".

    Returns:
        One or more clips, (F, H, W, 3), uint8.

    Raises:
        BadExample: If it is not a video, is damaged, has no frames or not enough of them.
        CacheError: If the decoder is not installed.
    """
    try:
        frames = (_read_pyav if decoder == "pyav" else _read_decord)(file, sampling, plan)
        return _make_clips(frames, sampling)
    except (BadExample, CacheError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any type on damaged files
        message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        reason = DECORD_PLACES.sub("", message.splitlines()[0])
        raise BadExample(f"cannot be decoded: {reason}") from error


def _make_clips(frames: Iterator[np.ndarray], sampling: FrameSampling) -> list[np.ndarray]:
    """As many whole clips as the frames make, at least one."""
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
        frames: Start and end in seconds, and the frame in any form, in order.
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
    """Hold the last frame of a clip that is too short, if the settings say so."""
    missing = sampling.num_frames - len(clip)
    if sampling.short == "hold":
        return clip + clip[-1:] * missing
    step = f"{sampling.fps:g} per second" if sampling.fps else f"a stride of {sampling.stride}"
    raise BadExample(f"is too short: {len(clip)} of {sampling.num_frames} frames at {step}")


def _step(sampling: FrameSampling, period: float) -> float:
    return 1 / sampling.fps if sampling.fps else sampling.stride * period


@contextmanager
def _open_pyav(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container and its stream of pictures."""
    try:
        import av
    except ImportError as error:
        raise CacheError("videos are decoded with PyAV: `pip install 'av>=17.1'`") from error
    with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
        if not container.streams.video:
            raise BadExample("has no stream of pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _read_pyav(file: BinaryIO, sampling: FrameSampling, plan: PlanCrop) -> Iterator[np.ndarray]:
    with _open_pyav(file) as (container, stream):
        period = _period(stream)
        frames = deinterlace(_decode(container, stream))
        count = sampling.num_frames * sampling.clips
        fit = FrameFitter(plan, _pixel_aspect(stream))
        for frame in pick_frames(_timed(frames, period), _step(sampling, period), period, count):
            yield fit(frame)


def _period(stream: Any) -> float:
    """Mean duration of a frame, seconds."""
    return 1 / float(stream.average_rate or stream.guessed_rate or USUAL_RATE)


def _pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel by its height."""
    return float(stream.sample_aspect_ratio or 1)


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of one layout in order of display."""
    layout = None
    for number, frame in enumerate(_decode_packets(container, stream)):
        if frame.is_corrupt:
            raise BadExample(f"is damaged at frame {number}")
        if layout not in (None, _layout(frame)):
            raise BadExample("changes its size on the way")
        layout = _layout(frame)
        if container.format.name == "avi":  # it stores no times of display, and FFmpeg's are wrong
            frame.pts = frame.dts
        yield frame


def _decode_packets(container: Any, stream: Any) -> Iterator[Any]:
    if not _hides_alpha(stream):
        yield from container.decode(stream)
        return
    from av import CodecContext

    decoder: Any = CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _hides_alpha(stream: Any) -> bool:
    """Whether a stream of WebM has transparency beside its pictures."""
    return stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ALPHA_DECODERS


def _layout(frame: Any) -> tuple[Any, ...]:
    return frame.height, frame.width, frame.format.name, quarter_turns(frame), is_mirrored(frame)


def _timed(frames: Iterable[Any], period: float) -> Iterator[tuple[float, float, Any]]:
    """Frames with start and end; one without a time, or a later one, follows after a period."""
    last: float | None = None
    for frame in frames:
        start = frame.time
        if last is not None and (start is None or start <= last):
            start = last + period
        last = start or 0.0
        duration = float((frame.duration or 0) * (frame.time_base or 0))
        yield last, last + (duration or period), frame


def _read_decord(file: BinaryIO, sampling: FrameSampling, plan: PlanCrop) -> Iterator[np.ndarray]:
    try:
        import decord
    except ImportError as error:
        raise CacheError("decord is not installed: `pip install decord`") from error
    with _open_pyav(file) as (container, stream):
        _check_for_decord(container, stream)
        times = _packet_times(container, stream)
        period = _period(stream)
        aspect = _pixel_aspect(stream)
    file.seek(0)
    reader = decord.VideoReader(file, num_threads=1)
    frames = [(start, end, index) for index, (start, end) in enumerate(times)]
    count = sampling.num_frames * sampling.clips
    crop = None
    for index in pick_frames(frames, _step(sampling, period), period, count):
        picture = Image.fromarray(reader[index].asnumpy())
        crop = crop or plan(picture.height, picture.width, aspect)
        yield np.asarray(scale_and_cut(picture, crop))


def _check_for_decord(container: Any, stream: Any) -> None:
    """Raise an error for kinds of videos that decord silently reads wrongly."""
    if container.format.name not in SURE_FOR_DECORD:
        raise _not_for_decord(f"{container.format.name} files")
    frame = next(container.decode(stream))
    for what, is_there in {
        "turned frames": quarter_turns(frame) or is_mirrored(frame),
        "interlaced frames": frame.interlaced_frame,
        "transparent frames": has_alpha(frame) or _hides_alpha(stream),
        "frames in RGB": frame.format.is_rgb,
        "AV1": "av1" in stream.codec_context.codec.canonical_name,
        "HDR and wide colours": is_wide(frame),
    }.items():
        if is_there:
            raise _not_for_decord(what)


def _packet_times(container: Any, stream: Any) -> list[tuple[float, float]]:
    """Start and end of each frame in seconds, in order, without decoding them.

    Raises:
        BadExample: If decord would count other frames: some are cut off, or a key frame is followed
            by frames that are shown before it.
    """
    container.seek(0)
    times: list[tuple[int, int]] = []
    key = 0
    for packet in container.demux(stream):
        if packet.pts is None:  # the end
            continue
        if packet.is_discard:
            raise _not_for_decord("edit lists")
        key = packet.pts if packet.is_keyframe or not times else key
        if packet.pts < key:
            raise _not_for_decord("open groups of frames")
        times.append((packet.pts, packet.pts + packet.duration))
    unit = float(stream.time_base)
    return [(start * unit, end * unit) for start, end in sorted(times)]


def _not_for_decord(what: str) -> BadExample:
    return BadExample(f"decord does not read {what} correctly: use --decoder pyav")
