"""What autoencoders are fitted to: crops of pictures, clips of videos, drawn shapes.

Every batch is a function of a seed, a stream and a step, so an interrupted run continues with the
data it would have seen.

Shapes: B batch, F frames, H W pixels.
"""

from __future__ import annotations

import functools
import glob
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import imageio.v2 as imageio
import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from pydantic import AfterValidator
from torch import Tensor

from diffnext.config.schema import Count, Natural, Positive, Section, Share, key, not_empty
from diffnext.config.targets import ConfigError
from shapes_world.rendering import draw_example
from shapes_world.scenes import CATEGORIES, CLIP_CATEGORIES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TRAINING, EVALUATION, MEASUREMENT = range(3)  # independent streams of random crops

Counts = Annotated[tuple[Count, ...], AfterValidator(not_empty), "list of int >= 1"]
Paths = Annotated[tuple[str, ...], "list of str"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """Where pictures and clips come from and how they are cropped."""

    images: Paths = key("Files, folders or glob patterns of pictures.", ())
    videos: Paths = key("Video files.", ())
    frame_stride: Count = key(
        "Use every n-th frame of the videos; clips draw a stride of at most this, as fits.", 8
    )
    hold_out_every: Natural = key(
        "Keep every n-th picture or frame for evaluation; for clips the last n-th part of every "
        "video. 0 evaluates on training pictures.",
        0,
    )
    crop_sizes: Counts = key("Sizes of the crops in pixels; each batch has one of them.", (64,))
    max_zoom_out: Positive = key("A crop shows at most this many times its own size, reduced.", 8.0)
    shapes_fraction: Share = key("Share of drawn shapes on plain backgrounds.", 0.0)
    clip_lengths: Counts = key(
        "Frames of the clips of a video autoencoder; each batch has one of them.", (1,)
    )


# --- files --------------------------------------------------------------------------------------


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Expand files, folders and glob patterns.

    Raises:
        ConfigError: If a pattern matches no picture.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = glob.glob(f"{pattern}/*" if os.path.isdir(pattern) else pattern)
        pictures = [name for name in sorted(matches) if name.lower().endswith(IMAGE_SUFFIXES)]
        if not pictures:
            raise ConfigError(f"data.images: no pictures match {pattern!r}")
        found += map(Path, pictures)
    return found


@functools.lru_cache(maxsize=64)
def read_image(path: Path) -> Image.Image:
    """Decode a picture to RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def read_frames(path: str, stride: int) -> list[Image.Image]:
    """Decode every ``stride``-th frame of a video.

    Raises:
        ConfigError: If there is no such file.
    """
    if not os.path.exists(path):
        raise ConfigError(f"data.videos: there is no file {path!r}")
    reader: Any = imageio.get_reader(path)
    with reader:
        return [Image.fromarray(frame) for index, frame in enumerate(reader) if index % stride == 0]


# --- crops --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A square region of a picture, in pixels that need not be whole."""

    left: float
    top: float
    side: float


def random_box(
    rng: np.random.Generator, picture_size: tuple[int, int], size: int, max_zoom_out: float
) -> Box:
    """Draw a square of log-uniform side; one of about ``size`` pixels lies on whole pixels.

    Args:
        rng: Source of randomness.
        picture_size: Width and height of the picture.
        size: Side of the finished crop.
        max_zoom_out: Largest side, in multiples of ``size``.
    """
    short_side = min(picture_size)
    largest = max(size, min(short_side, size * max_zoom_out))
    side = min(short_side, math.exp(rng.uniform(math.log(size), math.log(largest))))
    left, top = (rng.uniform(0, length - side) for length in picture_size)
    if side < size * 1.1 and short_side >= size:  # keep every pixel as it is
        width, height = picture_size
        return Box(min(int(left), width - size), min(int(top), height - size), size)
    return Box(left, top, side)


def cut_boxes(
    rng: np.random.Generator, frames: Iterable[Image.Image], boxes: Iterable[Box], size: int
) -> list[Image.Image]:
    """Cut a square out of each frame and scale it to ``size``; flip half of the clips."""
    is_flipped = rng.random() < 0.5
    crops = []
    for frame, box in zip(frames, boxes, strict=False):
        corners = (box.left, box.top, box.left + box.side, box.top + box.side)
        crop = frame.resize((size, size), Image.Resampling.LANCZOS, corners)
        crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else crop)
    return crops


def crop_randomly(
    rng: np.random.Generator, frames: list[Image.Image], size: int, max_zoom_out: float
) -> list[Image.Image]:
    """Cut the same random square out of all frames."""
    box = random_box(rng, frames[0].size, size, max_zoom_out)
    return cut_boxes(rng, frames, itertools.repeat(box), size)


def pan_picture(
    rng: np.random.Generator,
    picture: Image.Image,
    size: int,
    max_zoom_out: float,
    num_frames: int,
) -> list[Image.Image]:
    """Make a clip of a picture: a random square that pans and zooms slowly."""
    first = random_box(rng, picture.size, size, max_zoom_out)
    boxes = move_box(rng, picture.size, first, num_frames)
    return cut_boxes(rng, itertools.repeat(picture), boxes, size)


def move_box(
    rng: np.random.Generator, picture_size: tuple[int, int], box: Box, num_frames: int
) -> list[Box]:
    """Pan and zoom slowly from ``box``, at constant speed and within the picture.

    Args:
        rng: Source of randomness.
        picture_size: Width and height of the picture.
        box: The first region.
        num_frames: Regions wanted.
    """
    side = min(box.side * math.exp(rng.uniform(-0.2, 0.2)), *picture_size)
    shift = rng.uniform(-0.3, 0.3, 2) * box.side
    left, top = (
        min(max(start + (box.side - side) / 2 + way, 0.0), length - side)
        for start, way, length in zip((box.left, box.top), shift, picture_size, strict=True)
    )
    return [
        Box(*(a + (b - a) * t for a, b in ((box.left, left), (box.top, top), (box.side, side))))
        for t in np.linspace(0.0, 1.0, num_frames).tolist()
    ]


# --- batches ------------------------------------------------------------------------------------


def to_pixels(frames: Sequence[Image.Image | ndarray]) -> Tensor:
    """Stack pictures of one size to (F, 3, H, W), -1 to 1."""
    stacked = np.stack([np.asarray(frame) for frame in frames])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)


def split_off(items: list, every: int) -> tuple[list, list]:
    """Keep every ``every``-th item for evaluation; returns the items to train and evaluate on."""
    if not every:
        return items, items
    return [item for k, item in enumerate(items) if (k + 1) % every], items[every - 1 :: every]


def random_window(
    rng: np.random.Generator, frames: Sequence[Any], num_frames: int, max_stride: int
) -> Sequence[Any]:
    """Choose ``num_frames`` frames at even distances of at most ``max_stride``."""
    longest_stride = (len(frames) - 1) // max(num_frames - 1, 1)
    stride = 1
    if num_frames > 1:
        stride += int(rng.integers(min(max_stride, longest_stride)))
    start = int(rng.integers(len(frames) - stride * (num_frames - 1)))
    return frames[start : start + stride * (num_frames - 1) + 1 : stride]


@dataclass(frozen=True)
class Sources:
    """What examples are cut from.

    Attributes:
        pictures: Files of pictures, and frames that count as such; clips pan over them.
        videos: Decoded frames of each video.
    """

    pictures: list[Path | Image.Image]
    videos: list[list[Image.Image]]

    def __len__(self) -> int:
        """Number of pictures and videos."""
        return len(self.pictures) + len(self.videos)


class Sampler:
    """Random batches of crops of pictures and of drawn shapes, or of clips.

    Clips are parts of videos, pans over pictures and moving shapes. Videos are decoded once and
    kept in memory.

    Args:
        settings: Sources and sizes.
        is_video: Whether to draw clips.
        batch_size: Examples per batch of the smallest crops and the shortest clips; fewer of
            others, which keeps the number of pixels.
        seed: Seed of every stream.

    Raises:
        ConfigError: If a video is too short, or nothing is left to train or evaluate on.
    """

    def __init__(
        self, settings: DataSettings, is_video: bool, batch_size: int, seed: int
    ) -> None:
        self.settings = settings
        self.is_video = is_video
        self.batch_size = batch_size
        self.seed = seed
        every = settings.hold_out_every
        pictures: list[Path | Image.Image] = [*find_images(settings.images)]
        parts: list[tuple[list[Image.Image], list[Image.Image]]] = []
        for path in settings.videos:
            if is_video:
                parts.append(self._split_video(path))
            else:
                pictures += read_frames(path, settings.frame_stride)
        training, held_out = split_off(pictures, every)
        self.training = Sources(training, [frames for frames, _ in parts])
        self.held_out = Sources(held_out, [frames for _, frames in parts])
        if settings.shapes_fraction < 1 and not (len(self.training) and len(self.held_out)):
            raise ConfigError(
                f"data.hold_out_every={every} leaves {len(self.training)} pictures and videos to "
                f"train and {len(self.held_out)} to evaluate on"
            )

    def batch(self, stream: int, step: int) -> Tensor:
        """Draw pictures, (B, 3, H, W), or clips, (B, 3, F, H, W), -1 to 1.

        Clips to evaluate on have the greatest length.
        """
        rng = np.random.default_rng([self.seed, stream, step])
        sizes, lengths = self.settings.crop_sizes, self.settings.clip_lengths
        sources = self.held_out if stream == EVALUATION else self.training
        size = int(rng.choice(sizes))
        num_frames = max(lengths)
        if self.is_video and stream != EVALUATION:
            num_frames = int(rng.choice(lengths))
        share = (min(sizes) / size) ** 2 * min(lengths) / num_frames
        count = max(1, round(self.batch_size * share))
        examples = [self._draw(rng, sources, size, num_frames) for _ in range(count)]
        if not self.is_video:
            return to_pixels([frames[0] for frames in examples])
        clips = [to_pixels(frames) for frames in examples]
        return torch.stack(clips).transpose(1, 2).contiguous()

    def _split_video(self, path: str) -> tuple[list[Image.Image], list[Image.Image]]:
        """Decode a video; returns the frames to train and to evaluate on."""
        frames = read_frames(path, stride=1)
        every = self.settings.hold_out_every
        border = len(frames) - len(frames) // every if every else len(frames)
        training, held_out = frames[:border], frames[border:] if every else frames
        longest, shortest = max(self.settings.clip_lengths), min(len(training), len(held_out))
        if shortest < longest:
            raise ConfigError(
                f"data.clip_lengths={list(self.settings.clip_lengths)} needs {longest} frames, "
                f"but data.hold_out_every={every} leaves {shortest} of {path} to train or evaluate "
                "on"
            )
        return training, held_out

    def _draw(
        self, rng: np.random.Generator, sources: Sources, size: int, num_frames: int
    ) -> Sequence[Image.Image | ndarray]:
        settings = self.settings
        if rng.random() < settings.shapes_fraction:
            return self._draw_shapes(rng, size, num_frames)
        # Videos come up as often as pictures, however many there are of either.
        if sources.videos and (not sources.pictures or rng.random() < 0.5):
            frames = sources.videos[rng.integers(len(sources.videos))]
            window = random_window(rng, frames, num_frames, settings.frame_stride)
            return crop_randomly(rng, list(window), size, settings.max_zoom_out)
        picture = sources.pictures[rng.integers(len(sources.pictures))]
        if isinstance(picture, Path):
            picture = read_image(picture)
        if self.is_video:
            return pan_picture(rng, picture, size, settings.max_zoom_out, num_frames)
        return crop_randomly(rng, [picture], size, settings.max_zoom_out)

    def _draw_shapes(self, rng: np.random.Generator, size: int, num_frames: int) -> list[ndarray]:
        categories = CLIP_CATEGORIES if self.is_video else CATEGORIES
        length = num_frames if self.is_video else None
        return list(draw_example(rng, categories, size, length)[1])
