"""Writing images and videos to files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from diffnext.utils.file_parameters import image_exif, video_comment


def export_to_image(
    image: PIL.Image.Image | np.ndarray,
    output_image_path: str | os.PathLike | None = None,
    suffix: str = ".webp",
    quality: int = 100,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """Write one image.

    Args:
        image: A PIL image, or a uint8 array (H, W, 3) or (H, W).
        output_image_path: File to write; None makes a temporary file.
        suffix: Ending, and thereby format, of a temporary file.
        quality: Compression quality, 1 to 100, where the format has one.
        parameters: What the image was made with, written into the file; see ``read_parameters``.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the parameters cannot be written as JSON.
    """
    path = _output_path(output_image_path, suffix)
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(np.asarray(image))
    metadata = {} if parameters is None else {"exif": image_exif(parameters)}
    image.save(path, quality=quality, **metadata)
    return path


def export_to_video(
    video_frames: Sequence[np.ndarray] | np.ndarray,
    output_video_path: str | os.PathLike | None = None,
    fps: float = 12,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """Write a sequence of frames as a video.

    Args:
        video_frames: uint8 frames, each (H, W, 3).
        output_video_path: File to write; None makes a temporary ``.mp4``.
        fps: Frames per second.
        parameters: What the video was made with, written into the file; see ``read_parameters``.

    Returns:
        The path of the file.

    Raises:
        ImportError: If imageio is not installed.
        ValueError: If there are no frames, a frame is not (H, W, 3) uint8, or the parameters
            cannot be written as JSON.
    """
    try:
        import imageio
    except ImportError as error:
        raise ImportError("writing videos needs `pip install imageio imageio-ffmpeg`") from error
    frames = [_check_frame(frame) for frame in video_frames]
    if not frames:
        raise ValueError("a video needs at least one frame, got none")
    options = {"fps": fps, "macro_block_size": _block_size(frames[0])}
    if parameters is not None:
        options["output_params"] = video_comment(parameters)
    path = _output_path(output_video_path, ".mp4")
    # Frames keep their size: by default imageio would scale them to a multiple of 16.
    with imageio.get_writer(path, **options) as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def _output_path(path: str | os.PathLike | None, suffix: str) -> str:
    if path is not None:
        return os.fspath(path)
    handle, name = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return name


def _check_frame(frame: np.ndarray) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"frames must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
    return frame


def _block_size(frame: np.ndarray) -> int:
    """Smallest block that H.264 in 4:2:0 accepts: even sizes as they are, odd ones rounded up."""
    height, width, _ = frame.shape
    return 1 if height % 2 == 0 and width % 2 == 0 else 2
