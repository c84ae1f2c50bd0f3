"""The files of weights in the folder of a component, and what identifies them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

WEIGHTS_SUFFIXES = (".safetensors", ".bin")


def weights_files(folder: Path) -> list[Path]:
    """The files of weights in a component's folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS_SUFFIXES)


def hash_weights(folder: str | os.PathLike[str]) -> str:
    """Identify a component by its weights.

    Args:
        folder: With its weights file, or several.

    Returns:
        SHA-256, in hexadecimal, over the bytes of the weights files, one after the other, sorted
        by name.
    """
    digest = hashlib.sha256()
    for path in weights_files(Path(folder)):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
