"""Pictures, clips and autoencoders for tests of the cache builder."""

import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffnext.data.caching.settings import CacheSettings
from tests.tiny import make_vae, make_video_vae

SIZE = (32, 32)


def draw_picture(number: int, width: int = 48, height: int = 32) -> Image.Image:
    """A disc on a plain background, both coloured by the number."""
    colors = np.random.default_rng(number).integers(0, 256, (2, 3)).tolist()
    picture = Image.new("RGB", (width, height), tuple(colors[0]))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(picture).ellipse(box, tuple(colors[1]))
    return picture


def write_pictures(folder: Path, count: int, suffix: str = ".png") -> list[str]:
    """Pictures with captions in files beside them; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        name = f"{number:04d}{suffix}"
        draw_picture(number).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"Picture {number}. It has a disc.")
        names.append(name)
    return names


def numbered_frames(count: int, height: int = 32, width: int = 64) -> list[np.ndarray]:
    """Grey frames; the brightness of frame n is 8 n."""
    return [np.full((height, width, 3), 8 * number, np.uint8) for number in range(count)]


def frame_numbers(clip: np.ndarray) -> list[int]:
    """The numbers of decoded grey frames."""
    return [round(float(frame.mean()) / 8) for frame in clip]


def write_video(path, frames, rate=10, times=None, rotation=0) -> None:
    """Encode frames without loss of brightness.

    Args:
        path: File to write.
        frames: (H, W, 3) each.
        rate: Frames a second.
        times: Time of each frame in hundredths of a second, in place of the rate.
        rotation: Degrees of the display matrix.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if times is None else "libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
            stream.options = {"qp": "0", "bf": "0"}
        else:
            stream.codec_context.qmin = stream.codec_context.qmax = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts = times[number]
                frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_vae(folder: Path) -> Path:
    """An image autoencoder of stride 8 with random weights."""
    make_vae().save_pretrained(folder)
    return folder


def save_video_vae(folder: Path) -> Path:
    """A video autoencoder of stride 4x8x8 with random weights."""
    make_video_vae().save_pretrained(folder)
    return folder


def make_settings(source, output, vae, **changes) -> CacheSettings:
    """Small chunks of pictures."""
    values = {"kind": "images", "sizes": (SIZE,), "batch_size": 2, "chunk_size": 4}
    values |= {"source": str(source), "output": Path(output), "vae": Path(vae), "shard_size": 8}
    return CacheSettings(**{**values, **changes})


def read_files(folder: Path) -> dict[str, bytes]:
    """Name and content of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def run_with_kills(monkeypatch, run: Callable[[], object], *others: tuple[object, str]) -> int:
    """Run something until it is not killed any more, each time a little further.

    Every rename, removal and new folder is a moment to be killed at, before and after it.

    Args:
        monkeypatch: The fixture.
        run: What is killed, and goes on when it is called again.
        *others: Further functions that are such moments: the module of each, and its name.

    Returns:
        How often it was killed.
    """
    calls_left = kills = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls_left, kills
            if calls_left == 0:
                kills += 1
                if kills % 2:
                    function(*args, **kwargs)
                raise Killed
            calls_left -= 1
            return function(*args, **kwargs)

        return call

    moments = [(os, name) for name in ("replace", "mkdir", "rename", "remove")]
    with monkeypatch.context() as patch:
        for place, name in [*moments, (shutil, "rmtree"), *others]:
            patch.setattr(place, name, deadly(getattr(place, name)))
        for attempt in range(200):
            calls_left = 1 + attempt // 2
            try:
                run()
                return kills
            except Killed:
                pass
    raise AssertionError(f"still killed after {kills} times")
