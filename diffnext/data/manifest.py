"""``manifest.json``: what a dataset was made of and with, for training to check.

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
        config: What its ``config.json`` holds.
    """

    folder: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """The text encoder of cached text states.

    Attributes:
        hash: Of its weights.
        max_tokens: Of a caption.
    """

    hash: str | None = None
    max_tokens: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many.

    Attributes:
        examples: In the dataset.
        items: Of the source.
        skipped: Items and examples that were left out.
    """

    examples: Count | None = None
    items: Count | None = None
    skipped: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` holds; what is None is not known.

    Attributes:
        format: Of this file.
        kind: "images" or "videos".
        vae_hash: Of the weights of the autoencoder.
        vae: More about it.
        dtype: Of the moments.
        shape: Of the moments.
        size: Height and width in pixels.
        num_frames: Of a clip.
        flow_unit: Of the motion strengths; earlier versions measured hundredths of the short side.
        text_encoder: None without cached text states.
        counts: How many examples there are.
        datasets: Examples by folder, of several sizes.
        plan: All settings that the content depends on.
        versions: Of the packages that took part.
        sources: What a merged, split or resharded dataset was made of.
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
