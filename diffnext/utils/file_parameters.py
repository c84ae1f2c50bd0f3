"""The parameters of a result, kept in the file itself.

Pictures (PNG, WebP, JPEG, TIFF) carry them in the EXIF field ImageDescription, videos (MP4, WebM)
and GIF in the comment: as one JSON object of ASCII characters, which no reader mangles.

    exiftool -ImageDescription picture.webp
    ffprobe -show_entries format_tags=comment clip.mp4
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from diffnext.utils.json_files import FileError
from diffnext.utils.pictures import open_picture

__all__ = ["image_exif", "read_parameters", "to_json"]

CONTAINERS = "mov,mp4,matroska,webm,avi,asf,mpeg"
MAX_BYTES = 60_000  # JPEG takes 64 KiB of EXIF


def image_exif(parameters: Mapping[str, Any]) -> Image.Exif:
    """EXIF data for ``PIL.Image.Image.save``.

    Args:
        parameters: Values by name, all of which JSON can hold.

    Raises:
        ValueError: If JSON cannot hold a value, or the text is too long.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = to_json(parameters)
    return exif


def read_parameters(path: str | os.PathLike) -> dict[str, Any]:
    """The parameters that a picture or video carries.

    Args:
        path: A file written by :func:`diffnext.utils.export_to_image` or ``export_to_video``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture or video, or carries none.
    """
    try:
        with open_picture(path) as image:
            text = image.getexif().get(ExifTags.Base.ImageDescription, image.info.get("comment"))
    except FileError:
        text = _read_comment(Path(path))
    try:
        parameters = json.loads(text or "")
    except (TypeError, ValueError):
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} carries no parameters")
    return parameters


def to_json(parameters: Mapping[str, Any]) -> str:
    """The text that a file carries.

    Raises:
        ValueError: As for :func:`image_exif`.
    """
    try:
        text = json.dumps(dict(parameters), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"parameters must be values that JSON can hold: {error}") from None
    if len(text) > MAX_BYTES:
        raise ValueError(f"a file takes {MAX_BYTES} bytes of parameters, got {len(text)}")
    return text


def _read_comment(path: Path) -> str | None:
    import imageio_ffmpeg

    # Opens only this file: no stream of the network, no file that a playlist names.
    limits = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *limits, "-i"]
    result = subprocess.run(
        [*command, f"file:{path.absolute()}", "-f", "ffmetadata", "-"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode != 0:
        raise ValueError(f"{path} is not a picture or video")
    for line in result.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        if name.lower() == "comment":  # Matroska and WebM write it in capitals
            return re.sub(r"\\(.)", r"\1", value)  # ffmetadata escapes = ; # and \
    return None
