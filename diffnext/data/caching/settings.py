"""What a cache is built from, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from diffnext.data.caching.errors import CacheError

Size = tuple[int, int]  # height, width in pixels

KINDS = ("images", "videos")
FORMATS = ("auto", "media", "csv", "jsonl", "parquet", "tar", "huggingface")
RESIZE_MODES = ("cover", "stretch")
DTYPES = ("float16", "bfloat16", "float32")
DECODERS = ("pyav", "decord")
MAX_FLOAT = 1e6
USUAL_BATCH_SIZES = {"images": 8, "videos": 1}  # a video is many pictures at once

# Where, how fast and how strictly, but not what: a build may go on with others of these. Of the
# encoders the weights count, not the folders.
_FREE = ("output vae text_encoder device batch_size workers on_error time_limit update").split()


def _choices(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CacheError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, minimum: float) -> None:
    if not minimum <= value < float("inf"):
        raise CacheError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table; None looks for the usual names.

    Attributes:
        media: Paths of the files, or their bytes.
        caption: Long captions.
        text: Short captions.
        label: Classes.
        flow: Motion strengths.
    """

    media: str | None = None
    caption: str | None = None
    text: str | None = None
    label: str | None = None
    flow: str | None = None


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video make a clip.

    Frames are chosen by their time, so that clips run at one speed whatever the frame rate does.

    Attributes:
        num_frames: Frames of a clip.
        stride: Steps of the video's mean frame duration from one frame to the next.
        fps: Frames per second in place of a stride.
        clips: At most so many clips of a video, one after the other.
        short: What becomes of a video too short for one clip: "skip" it, or "hold" its last frame.
    """

    num_frames: int = 33
    stride: int = 2
    fps: float | None = None
    clips: int = 1
    short: Literal["skip", "hold"] = "skip"

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride", "clips"):
            _at_least(name, getattr(self, name), 1)
        if self.fps is not None and not 0 < self.fps < MAX_FLOAT:
            raise CacheError(f"fps must be above 0, got {self.fps}")
        _choices("short", self.short, ("skip", "hold"))


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Everything about one build.

    Attributes:
        kind: "images" or "videos".
        source: Folder, glob pattern or file; see ``sources.list_items``.
        output: Folder to write. With several sizes it gets a dataset for each of them.
        vae: Folder of the autoencoder, or a release folder with ``vae/``.
        format: Kind of source; "auto" tells by its name.
        split: Of a Hugging Face dataset.
        root: Folder that paths in a table are relative to; by default the table's own.
        columns: Of a table.
        sizes: (height, width) in pixels; an example gets the one of the nearest aspect.
        resize: "cover" scales to cover the size and cuts the middle out, "stretch" distorts.
        max_upscale: Examples that would have to be enlarged more than this are skipped.
        max_pixels: Pictures and frames of more pixels are skipped unread.
        frames: Of videos.
        decoder: Of videos.
        flow: Motion strength of every clip without one of its own; None estimates it.
        flip: Whether a mirrored copy follows each example whose caption names no side.
        labels: Whether examples have a class in place of captions.
        empty_captions: Whether examples without a caption get an empty one; else they are skipped.
        max_caption: Characters of the longest caption.
        text_encoder: Release folder whose text encoder's states are stored in place of captions.
        text_length: Tokens of a caption that are encoded at most.
        batch_size: Examples encoded at once.
        dtype: That the autoencoder computes in. Moments are stored as float16 whatever it is.
        device: That it runs on.
        workers: Threads that decode.
        chunk_size: Items of the source that are lost at most when a process is killed.
        shard_size: Examples to a shard of the dataset.
        on_error: "skip" bad examples, or "stop" at the first.
        time_limit: Seconds after which a decoder that still works on an item is stopped.
        update: Whether items that changed since they were read are read again, and new ones added;
            else they are an error.
    """

    kind: Literal["images", "videos"]
    source: str
    output: Path
    vae: Path
    format: str = "auto"
    split: str | None = None
    root: Path | None = None
    columns: Columns = field(default_factory=Columns)
    sizes: tuple[Size, ...]
    resize: str = "cover"
    max_upscale: float = 4.0
    max_pixels: int = 2**27
    frames: FrameSampling = field(default_factory=FrameSampling)
    decoder: str = "pyav"
    flow: float | None = None
    flip: bool = False
    labels: bool = False
    empty_captions: bool = False
    max_caption: int = 10_000
    text_encoder: Path | None = None
    text_length: int = 256
    batch_size: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    workers: int = 2
    chunk_size: int = 64
    shard_size: int = 8192
    on_error: Literal["skip", "stop"] = "skip"
    time_limit: float = 120.0
    update: bool = False

    def __post_init__(self) -> None:
        _choices("kind", self.kind, KINDS)
        _choices("format", self.format, FORMATS)
        _choices("resize", self.resize, RESIZE_MODES)
        _choices("decoder", self.decoder, DECODERS)
        _choices("dtype", self.dtype, DTYPES)
        _choices("on_error", self.on_error, ("skip", "stop"))
        names = ("max_pixels", "max_caption", "text_length", "batch_size", "workers", "chunk_size")
        for name in names:
            _at_least(name, getattr(self, name), 1)
        _at_least("max_upscale", self.max_upscale, 1)
        _at_least("shard_size", self.shard_size, 1)
        _at_least("time_limit", self.time_limit, 1)
        if not self.sizes:
            raise CacheError("at least one size is needed")
        if len(set(self.sizes)) < len(self.sizes):
            raise CacheError(f"sizes must differ, got {format_sizes(self.sizes)}")
        for size in self.sizes:
            if min(size) < 1:
                raise CacheError(f"sizes must be positive, got {format_size(size)}")
        if self.labels and self.text_encoder is not None:
            raise CacheError("labels take the place of captions: there is no text to encode")

    def describe(self) -> dict[str, Any]:
        """What the content of the dataset depends on, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}
        if self.kind == "images":
            for name in ("frames", "decoder", "flow"):
                del values[name]
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return asdict(value) if isinstance(value, (Columns, FrameSampling)) else value


def parse_size(text: str) -> Size:
    """Read ``512`` or ``480x768`` (height x width).

    Raises:
        CacheError: If it is neither.
    """
    numbers = text.lower().split("x")
    if len(numbers) not in (1, 2) or not all(n.isascii() and n.isdigit() for n in numbers):
        raise CacheError(f"a size is SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(numbers[0]), int(numbers[-1])


def format_size(size: Size) -> str:
    """``480x768``, as folders of sizes are named."""
    return f"{size[0]}x{size[1]}"


def format_sizes(sizes: tuple[Size, ...]) -> str:
    """Several sizes for a message."""
    return ", ".join(format_size(size) for size in sizes)
