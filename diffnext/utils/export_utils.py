"""Writing images and videos to files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diffnext.utils.file_parameters import image_exif, to_json

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv")
CODECS = {".webm": "libvpx-vp9"}  # imageio chooses the others


def export_to_image(
    image: PIL.Image.Image | np.ndarray,
    output_image_path: str | os.PathLike[str] | None = None,
    suffix: str = ".webp",
    quality: int = 100,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """Write one image.

    Args:
        image: A PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
        output_image_path: File to write; None makes a temporary file.
        suffix: Ending, and thereby format, of a temporary file.
        quality: Compression quality, 1 to 100, where the format has one.
        parameters: What the image was made with, written into the file; see ``read_parameters``.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the image, the quality or the ending of the path cannot be used, or the
            parameters cannot be written as JSON.
        OSError: If the file cannot be written; none is left behind.
    """
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(_check_pixels("image", image, [(), (3,), (4,)]))
    if quality not in range(1, 101):
        raise ValueError(f"quality must be a whole number, 1 to 100, got {quality!r}")
    options: dict[str, Any] = {"quality": quality}
    if parameters is not None:
        options["exif"] = image_exif(parameters)
    formats = PIL.Image.registered_extensions()
    suffixes = [ending for ending, name in formats.items() if name in PIL.Image.SAVE]
    with _new_file("output_image_path", output_image_path, suffix, suffixes) as path:
        image.save(path, **options)
    return path


def export_to_video(
    video_frames: Sequence[np.ndarray] | np.ndarray,
    output_video_path: str | os.PathLike[str] | None = None,
    fps: float = 12,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """Write a sequence of frames as a video.

    Args:
        video_frames: uint8 frames of one size, each (H, W, 3).
        output_video_path: File to write; its ending chooses the format. None makes a temporary
            ``.mp4``.
        fps: Frames per second; a GIF shows each frame for a multiple of 10 ms.
        parameters: What the video was made with, written into the file; see ``read_parameters``.

    Returns:
        The path of the file.

    Raises:
        ImportError: If imageio is not installed.
        ValueError: If there are no frames, a frame is not (H, W, 3) uint8, sizes differ, ``fps``
            is not positive, the ending is not a video's, or the parameters cannot be
            written as JSON.
        TypeError: If there is nothing to iterate over.
        OSError: If the file cannot be written; none is left behind.
    """
    try:
        import imageio
    except ImportError as error:
        raise ImportError("writing videos needs `pip install imageio imageio-ffmpeg`") from error
    if not isinstance(video_frames, Iterable):
        raise TypeError(f"video_frames must be frames, got {type(video_frames).__name__}")
    frames = [_check_pixels("video_frames", frame, [(3,)]) for frame in video_frames]
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"video_frames must be at least one frame, all of one size, got {sizes}")
    if not isinstance(fps, Real) or not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    comment = None if parameters is None else to_json(parameters)
    with _new_file("output_video_path", output_video_path, ".mp4", VIDEO_SUFFIXES) as path:
        suffix = Path(path).suffix.lower()
        if suffix == ".gif":
            first, *others = map(PIL.Image.fromarray, frames)
            options = {} if comment is None else {"comment": comment}
            first.save(
                path, save_all=True, append_images=others, duration=1000 / fps, loop=0, **options
            )
            return path
        # Frames keep their size, but for odd ones, which H.264 in 4:2:0 does not take: by default
        # imageio would scale them to a multiple of 16.
        is_odd = any(length % 2 for length in sizes[0])
        imageio.mimwrite(
            path,
            frames,
            format="FFMPEG",
            fps=float(fps),
            codec=CODECS.get(suffix),
            macro_block_size=2 if is_odd else 1,
            output_params=[] if comment is None else ["-metadata", f"comment={comment}"],
        )
    return path


def _check_pixels(name: str, pixels: Any, channels: Sequence[tuple[int, ...]]) -> np.ndarray:
    array = np.asarray(pixels)
    is_picture = array.ndim >= 2 and array.shape[2:] in channels and array.size > 0
    if not is_picture or array.dtype != np.uint8:
        raise ValueError(f"{name} must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return array


@contextmanager
def _new_file(name: str, path: Any, suffix: str, suffixes: Iterable[str]) -> Iterator[str]:
    """An empty file to fill, temporary if ``path`` is None; it is removed if that fails."""
    if path is None:
        name = "suffix"
    file = f"new{suffix}" if path is None else str(path)
    if os.path.splitext(file)[1].lower() not in suffixes:
        raise ValueError(f"{name} must end in one of {sorted(suffixes)}, got {path or suffix!r}")
    try:
        if path is None:
            handle, file = tempfile.mkstemp(suffix=suffix)
            os.close(handle)
        Path(file).write_bytes(b"")
    except OSError as error:
        raise type(error)(f"{name} cannot be written: {error}") from error
    try:
        yield file
        if os.path.getsize(file) == 0:
            raise OSError(f"{name} was not written: {file}")
    except BaseException:
        os.unlink(file)
        raise
