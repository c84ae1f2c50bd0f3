"""``manifest.json``: how a dataset was made, for training to check.

The keys are described in docs/data_format.md.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from diffnext.data.plain_files import read_typed
from diffnext.data.record_format import RecordError
from diffnext.utils.json_files import write_json
from diffnext.version import __version__

MANIFEST_NAME = "manifest.json"
MOMENTS_DTYPE = "float16"
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "pillow",
    "av",
    "decord",
    "opencv-python-headless",
)

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class VaeFacts:
    """The autoencoder.

    Attributes:
        folder: Where it was.
        config: The content of its ``config.json``.
    """

    folder: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """The text encoder of cached text states.

    Attributes:
        hash: Hash of its weights.
        max_tokens: Most tokens of a caption.
    """

    hash: str | None = None
    max_tokens: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of examples and items.

    Attributes:
        examples: Examples in the dataset.
        items: Items of the source.
        skipped: Items and examples that were left out.
    """

    examples: Count | None = None
    items: Count | None = None
    skipped: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; None means unknown.

    Attributes:
        format: Version of this file.
        kind: "images" or "videos".
        vae_hash: Hash of the autoencoder's weights.
        vae: More about the autoencoder.
        dtype: Type of the moments.
        shape: Shape of the moments.
        size: Height and width in pixels.
        num_frames: Frames of a clip.
        flow_unit: Unit of the motion strengths; earlier versions measured hundredths of the short
            side.
        text_encoder: None without cached text states.
        counts: Numbers of examples and items.
        datasets: With several sizes, the number of examples in each folder.
        plan: All settings that the content depends on.
        versions: Versions of the packages that took part.
        sources: The datasets that a merged, split or resharded one was made of.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    format: Literal[1] = 1
    kind: str | None = None
    vae_hash: str | None = None
    vae: VaeFacts | None = None
    dtype: str | None = None
    shape: tuple[Count, ...] | None = None
    size: tuple[Count, Count] | None = None
    num_frames: Count | None = None
    flow_unit: str | None = None
    text_encoder: TextFacts | None = None
    counts: Counts = field(default_factory=Counts)
    datasets: dict[str, Count] | None = None
    plan: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    sources: list[dict[str, Any]] | None = None


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a dataset; None if it has none.

    Raises:
        RecordError: If it is damaged, or a link.
    """
    try:
        return read_typed(Path(folder) / MANIFEST_NAME, TypeAdapter(Manifest))
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RecordError(f"{error}; copy the dataset again, or build it in a new folder") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a dataset."""
    content = TypeAdapter(Manifest).dump_python(manifest, mode="json", exclude_none=True)
    write_json(folder / MANIFEST_NAME, content)


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that latents may depend on."""
    versions = {"python": platform.python_version(), "diffnext": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
