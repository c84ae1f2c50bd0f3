"""Where the samples of a benchmark go, and how they are written.

Files get their names when they are complete, so one that exists is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy import ndarray

from diffnext.utils import export_to_image, export_to_video

__all__ = ["GenEvalLayout", "Layout", "VBenchLayout", "safe_name", "write_whole"]

VIDEO_SUFFIX = ".mp4"
FPS = 12
MAX_NAME_BYTES = 231  # file systems usually take 255; the number and ending of a sample come after
_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f]")


class Layout(ABC):
    """Files of one benchmark.

    Args:
        outdir: Folder of all samples.
    """

    def __init__(self, outdir: str | os.PathLike) -> None:
        self.outdir = Path(outdir).expanduser().absolute()

    @abstractmethod
    def path(self, prompt: int, sample: int) -> Path:
        """The file of a sample; both numbers start at 0."""

    @abstractmethod
    def write(self, prompt: int, sample: int, frames: ndarray) -> None:
        """Write a sample, (F, H, W, 3) of uint8, whose file is :meth:`path`."""

    def prepare(self, prompt: int) -> None:  # noqa: B027 - most need nothing
        """Write the files beside the samples of a prompt, if there are any."""

    def repeats(self, prompt: int) -> bool:
        """Whether a prompt shares its files with an earlier one."""
        return False

    def missing(self, prompt: int, num_samples: int) -> list[int]:
        """The samples of a prompt that are not finished."""
        return [k for k in range(num_samples) if not self.path(prompt, k).is_file()]


class GenEvalLayout(Layout):
    """``<prompt, 5 digits>/metadata.jsonl`` and ``<prompt>/samples/<sample, 5 digits>.png``.

    Args:
        outdir: Folder of all samples.
        records: The benchmark's metadata, an object per prompt.
    """

    def __init__(self, outdir: str | os.PathLike, records: Sequence[dict[str, Any]]) -> None:
        super().__init__(outdir)
        self.records = records

    def path(self, prompt: int, sample: int) -> Path:
        """The file of a sample."""
        return self.outdir / f"{prompt:05}" / "samples" / f"{sample:05}.png"

    def prepare(self, prompt: int) -> None:
        """Write the metadata of a prompt."""
        path = self.outdir / f"{prompt:05}" / "metadata.jsonl"
        line = json.dumps(self.records[prompt]) + "\n"
        if not path.is_file():
            write_whole(path, lambda partial: partial.write_text(line))

    def write(self, prompt: int, sample: int, frames: ndarray) -> None:
        """Write a picture, the first frame of a video."""
        path = self.path(prompt, sample)
        write_whole(path, lambda partial: export_to_image(frames[0], partial))


class VBenchLayout(Layout):
    """``<tag>/<text>-<sample>.mp4``.

    In texts, path separators and control characters become "_". Names that the file system cannot
    hold or that another text already has end with a part of a SHA-256. Prompts that repeat tag and
    text share their files.

    Args:
        outdir: Folder of all samples.
        texts: The benchmark's short texts.
        tags: Group of each.
    """

    def __init__(
        self, outdir: str | os.PathLike, texts: Sequence[str], tags: Sequence[str]
    ) -> None:
        super().__init__(outdir)
        self._stems: list[Path] = []
        owners: dict[Path, tuple[str, str]] = {}
        for tag, text in zip(tags, texts, strict=True):
            stem = Path(safe_name(tag)) / safe_name(text.removesuffix(VIDEO_SUFFIX))
            if owners.setdefault(stem, (tag, text)) != (tag, text):
                stem = stem.with_name(_hashed(stem.name, f"{tag}/{text}"))
            self._stems.append(stem)

    def path(self, prompt: int, sample: int) -> Path:
        """The file of a sample."""
        stem = self._stems[prompt]
        return self.outdir / stem.parent / f"{stem.name}-{sample}{VIDEO_SUFFIX}"

    def repeats(self, prompt: int) -> bool:
        """Whether an earlier prompt has the same tag and text."""
        return self._stems.index(self._stems[prompt]) < prompt

    def write(self, prompt: int, sample: int, frames: ndarray) -> None:
        """Write a clip of 12 frames per second."""
        path = self.path(prompt, sample)
        write_whole(path, lambda partial: export_to_video(frames, partial, fps=FPS))


def safe_name(text: str) -> str:
    """Any Unicode text as the name of a file or folder.

    Returns:
        The text without path separators and control characters, cut if it is too long.
    """
    name = _FORBIDDEN.sub("_", text)
    if set(name) <= {"."}:
        name = name.replace(".", "_") or "_"
    return _hashed(name, text) if len(name.encode()) > MAX_NAME_BYTES else name


def _hashed(name: str, text: str) -> str:
    """A name, cut if necessary, that differs from the names of other texts."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    room = MAX_NAME_BYTES - len(digest) - 1
    return f"{name.encode()[:room].decode(errors='ignore')}-{digest}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there.

    Args:
        path: Where it goes; its folder is made.
        write: Writes the file it is given, whose name ends like that of ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]
    partial = path.with_name(f".partial-{digest}{path.suffix}")
    write(partial)
    os.replace(partial, path)
