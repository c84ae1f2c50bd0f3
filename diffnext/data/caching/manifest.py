"""``manifest.json``: what a dataset was made of and with, for training to check.

The keys are described in docs/data_format.md.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from diffnext.data.caching.errors import CacheError
from diffnext.utils.json_files import read_json
from diffnext.version import __version__

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
MOMENTS_DTYPE = "float16"
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "av", "decord")


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a dataset; None if it has none.

    Raises:
        CacheError: If it is damaged.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise CacheError(f"the manifest is damaged: {error}") from error


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that latents may depend on."""
    versions = {"python": platform.python_version(), "diffnext": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
