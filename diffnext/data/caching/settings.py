"""What a cache is built from, and how: every setting with its meaning, default and limits.

``diffnext cache`` offers the same settings as options, with the same texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from diffnext.data.caching.errors import CacheError, printable

Size = tuple[int, int]  # height, width in pixels

USUAL_BATCH_SIZES = {"images": 8, "videos": 1}  # a video is many pictures at once

# These may change while a build goes on: they decide where, how fast and how strictly it is built,
# but not what. Of the encoders the weights count, not the folders.
_FREE = ("output vae text_encoder device batch_size workers on_error time_limit update").split()


def option(
    meaning: str,
    default: Any = MISSING,
    *,
    kind: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
) -> Any:
    """Declare a setting.

    Args:
        meaning: For ``--help``, which adds the default unless this ends with a bracket.
        default: Its value if it is not given; without one it is required.
        kind: Makes a value from text; by default the type of ``default``.
        metavar: What ``--help`` calls the value.
        choices: The values that it may have.
        minimum: The least number that it may be.
    """
    kind = kind or type(default)
    metadata = {"kind": kind, "meaning": meaning, "metavar": metavar}
    return field(default=default, metadata={**metadata, "choices": choices, "minimum": minimum})


def _number_or_auto(text: str) -> float | None:
    return None if text == "auto" else float(text)


def _check(settings: Any) -> None:
    """Compare values with the choices and limits of their options."""
    for setting in fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        choices, minimum = setting.metadata.get("choices"), setting.metadata.get("minimum")
        if choices is not None and value not in choices:
            raise CacheError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        is_number = minimum is not None and value is not None
        if is_number and not minimum <= value < float("inf"):
            raise CacheError(f"{name} must be at least {minimum}, got {value}")


def _column(content: str) -> Any:
    return option(f"column of {content}", None, kind=str, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table; None looks for the usual names."""

    media: str | None = _column("files, or of their bytes")
    caption: str | None = _column("long captions")
    text: str | None = _column("short captions")
    label: str | None = _column("classes")
    flow: str | None = _column("motion strengths")


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video make a clip.

    Frames are chosen by their time, so clips run at one speed even if the frame rate varies.

    Raises:
        CacheError: If a value is not allowed.
    """

    num_frames: int = option("frames of a clip", 33, minimum=1)
    stride: int = option("frames of the video from one to the next", 2, minimum=1)
    fps: float | None = option(
        "frames per second, instead of --stride", None, kind=float, minimum=1e-6
    )
    clips: int = option("clips of a video at most, one after the other", 1, minimum=1)
    short: Literal["skip", "hold"] = option(
        "leave out videos that are too short, or hold their last frame",
        "skip",
        choices=("skip", "hold"),
    )

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Everything about one build.

    Raises:
        CacheError: If a value is not allowed.
    """

    kind: Literal["images", "videos"] = option("what is cached", choices=("images", "videos"))
    source: str  # folder, glob pattern or file; see ``sources.list_items``
    output: Path = option("folder to write", kind=Path)
    vae: Path = option("folder of the autoencoder, or one with vae/ in it", kind=Path)
    format: str = option(
        "kind of the source (by its name)",
        "auto",
        choices=("auto", "media", "csv", "jsonl", "parquet", "tar", "huggingface"),
    )
    split: str | None = option("of a Hugging Face dataset, such as train", None, kind=str)
    root: Path | None = option("where a table's paths begin (the table's folder)", None, kind=Path)
    columns: Columns = field(default_factory=Columns)
    sizes: tuple[Size, ...]  # an example gets the one of the nearest aspect
    resize: str = option(
        "scale to cover the size and cut the middle out, or distort",
        "cover",
        choices=("cover", "stretch"),
    )
    max_upscale: float = option(
        "leave out pictures that would be enlarged more than X times", 4.0, metavar="X", minimum=1
    )
    max_pixels: int = option(
        "leave out pictures of more pixels, unread", 2**27, metavar="N", minimum=1
    )
    frames: FrameSampling = field(default_factory=FrameSampling)
    decoder: str = option("what reads videos", "pyav", choices=("pyav", "decord"))
    flow: float | None = option(
        "motion strength of clips without one in the table or side file; auto measures how many "
        "pixels, at a height of 480, moving things move from frame to frame (auto)",
        None,
        kind=_number_or_auto,
        metavar="X",
        minimum=0,
    )
    flip: bool = option(
        "add a mirrored copy after each example, unless its captions say left or right", False
    )
    labels: bool = option("store the label, a whole number, and no caption", False)
    empty_captions: bool = option("keep examples that have no caption", False)
    max_caption: int = option(
        "leave out examples with captions of more characters", 10_000, metavar="N", minimum=1
    )
    text_encoder: Path | None = option(
        "store text states instead of captions: a release folder with text_encoder/ and tokenizer/",
        None,
        kind=Path,
        metavar="DIR",
    )
    text_length: int = option("tokens encoded at most", 256, metavar="N", minimum=1)
    batch_size: int = option(
        "examples encoded at once (8 pictures, 1 clip)", 8, metavar="N", minimum=1
    )
    dtype: str = option(
        "to compute in; stored are float16 (float16 on a GPU, float32 on a CPU)",
        "float32",
        choices=("float16", "bfloat16", "float32"),
    )
    device: str = option("cpu, cuda or cuda:1 (a GPU if there is one)", "cpu")
    workers: int = option("processes that decode (one per core, at most 8)", 2, minimum=1)
    chunk_size: int = option(
        "files that a kill costs at most (8 videos, or 64 pictures for each size)",
        64,
        metavar="N",
        minimum=1,
    )
    shard_size: int = option("examples per shard", 8192, metavar="N", minimum=1)
    on_error: Literal["skip", "stop"] = option(
        "list bad files and continue, or stop at the first", "skip", choices=("skip", "stop")
    )
    time_limit: float = option(
        "leave out files that take longer to decode", 120.0, metavar="SECONDS", minimum=1
    )
    update: bool = option(
        "read again what changed in the source since the last build, and keep the rest", False
    )

    def __post_init__(self) -> None:
        _check(self)
        if not self.sizes:
            raise CacheError("at least one size is needed")
        if len(set(self.sizes)) < len(self.sizes):
            raise CacheError(f"sizes must differ, got {', '.join(map(format_size, self.sizes))}")
        for size in self.sizes:
            if min(size) < 1:
                raise CacheError(f"sizes must be positive, got {format_size(size)}")
        if self.labels and self.text_encoder is not None:
            raise CacheError("labels are stored instead of captions: there is no text to encode")

    def describe(self) -> dict[str, Any]:
        """The settings that the content of the dataset depends on, as plain values."""
        left_out = [*_FREE, *(("frames", "decoder", "flow") if self.kind == "images" else ())]
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        values["sizes"] = [list(size) for size in self.sizes]
        values["source"] = printable(self.source)
        values["root"] = None if self.root is None else printable(str(self.root))
        return values


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
