"""The files of a component, such as a model or a tokenizer, checked before libraries read them.

A folder may come from a stranger, and the libraries that load components follow what it says: links
that lead elsewhere, shards with the paths of other files, another model that an adapter names.
:func:`component_files` raises an error for foreign or damaged files.
"""

from __future__ import annotations

import os
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffnext.utils.folders import INDEX_FILE
from diffnext.utils.json_files import FileError, read_json

__all__ = [
    "BASE_FOLDER_FILE",
    "INDEX_FILE",
    "component_files",
    "is_plain_name",
    "own_path",
    "read_base_reference",
    "reading",
]

BASE_FOLDER_FILE = "base_folder.json"
PICKLES = (".pkl", ".pickle")  # of Python objects: no component needs one


@contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn the errors of other libraries into one that names the folder.

    Damaged files make them raise errors of many types, most without the name of the file.

    Args:
        path: File or folder that is read.
        what: What it must be, such as the name of a class.

    Raises:
        FileError: Instead of all errors except those of files and of memory.
    """
    try:
        yield
    except (FileError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 1000)
        raise FileError(f"{path} cannot be loaded as {what}: {reason}") from error


def is_plain_name(name: object) -> bool:
    """Whether it can name a component: an identifier, so never a path."""
    return isinstance(name, str) and name.isidentifier()


def read_base_reference(folder: Path) -> tuple[Path | None, dict[str, Path]]:
    """The folders that ``base_folder.json`` names.

    This package writes it: a training checkpoint names the folder of its other components, a
    component with another config the folder of its weights.

    Args:
        folder: Any release folder or component.

    Returns:
        Its base folder, None if it is complete in itself, and components that are elsewhere.

    Raises:
        FileError: If the file is damaged, or a path is not absolute.
    """
    file = own_path(folder, BASE_FOLDER_FILE)
    if not file.is_file():
        return None, {}
    content = read_json(file)
    components = content.get("components", {})
    if not isinstance(components, dict) or not all(map(is_plain_name, components)):
        raise FileError(f"{file}: components must hold paths by name, got {components!r}")
    for path in (content.get("base_folder"), *components.values()):
        if not isinstance(path, str) or not Path(path).is_absolute() or "\0" in path:
            raise FileError(f"{file} must hold absolute paths, got {path!r}")
    return Path(content["base_folder"]), {name: Path(path) for name, path in components.items()}


def own_path(folder: Path, name: str) -> Path:
    """A file or folder in another folder.

    Raises:
        FileError: If it is a link that leads out of the folder. Allowed are links into the Hub's
            cache, to other parts of a release folder, and to the same file of the base.
    """
    target = Path(os.path.realpath(folder / name))
    origins = [Path(os.path.realpath(folder))] if name == BASE_FOLDER_FILE else _origins(folder)
    for origin in origins:
        if Path(os.path.realpath(origin / name)) != target:
            break
        release = origin.parent if (origin.parent / INDEX_FILE).is_file() else origin
        if any(target.is_relative_to(place) for place in _own_places(release)):
            return folder / name
    raise FileError(f"{folder / name} is a link that leads out of its folder, to {target}")


def _origins(folder: Path) -> list[Path]:
    """The folder, the one it was made of, the one that was made of, and so on."""
    origins: list[Path] = []
    origin: Path | None = folder
    while origin is not None and (real := Path(os.path.realpath(origin))) not in origins:
        origins.append(real)
        origin, _ = read_base_reference(real)
    return origins


def _own_places(release: Path) -> list[Path]:
    """A folder and, of a snapshot in the Hub's cache, the one with the files it links to."""
    places = [release]
    for parent in (release, *release.parents):
        if parent.parent.name == "snapshots" and parent.parts[-3].startswith("models--"):
            places.append(parent.parent.parent / "blobs")
    return places


def component_files(folder: Path) -> dict[str, Path]:
    """The files of one component, all checked to be its own and undamaged.

    Args:
        folder: The component's folder, by itself or in a release folder.

    Returns:
        Each file by its name in the folder, with links followed.

    Raises:
        FileError: If a link leads out of the folder (the Hub's cache and the same file of the
            folder's base are allowed); if JSON, shards or headers of weights are damaged; or if a
            file that is not needed runs code or leads to other models.
        FileNotFoundError: If the folder is missing.
    """
    files = _own_files(folder)
    for name in files:
        place = folder / name
        if place.suffix in PICKLES:
            raise FileError(f"{place} is a pickle, which could run code: remove it")
        if name == "adapter_config.json":
            raise FileError(f"{place} would load another model: merge the adapter first")
        if place.suffix == ".json":
            _check_json(place, read_json(place), files)
        elif place.suffix == ".safetensors":
            _check_header(place)
    if not any(name.endswith(".safetensors") for name in files):
        for name in files:
            if name.endswith(".bin") and "pytorch_model" in name:
                _check_tensors(folder / name)
    return files


def _own_files(folder: Path) -> dict[str, Path]:
    """Files by name, with links followed; see :func:`component_files`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    root = Path(os.path.realpath(folder))
    files = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        target = Path(os.path.realpath(own_path(folder, name)))
        if target.is_file():
            files[name] = target
        elif path.is_symlink() or not target.is_dir():
            raise FileError(f"{folder / name} must be a file, a link to a file, or a folder")
    return files


def _check_json(path: Path, content: dict[str, Any], files: dict[str, Path]) -> None:
    """Check that a JSON file leads libraries to no other files and no code."""
    if path.name.endswith(".index.json"):
        shards = content.get("weight_map")
        is_sound = isinstance(shards, dict) and isinstance(content.get("metadata"), dict)
        if not is_sound or not shards:
            raise FileError(f"{path} must hold metadata, and in weight_map a file for each weight")
        _check_names(path, "weight_map", shards.values(), files)
    names = content.get("fast_tokenizer_files")
    _check_names(path, "fast_tokenizer_files", names if isinstance(names, list) else (), files)
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(content.get(key)):
            raise FileError(f"{path}: {key} must not name code of the Hub, got {content[key]!r}")


def _check_names(path: Path, key: str, names: Iterable[Any], files: dict[str, Path]) -> None:
    """Check that the names under a key are those of files in the same folder."""
    for name in names:
        if not isinstance(name, str) or name not in files or "/" in name:
            raise FileError(f"{path}: {key} must name files beside it, got {name!r}")


def _check_header(path: Path) -> None:
    """Check the header of weights, which is read without the tensors."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise FileError(f"{path} is not a safetensors file: {error}") from error


def _check_tensors(path: Path) -> None:
    """Check that a pickled file of weights holds only tensors; their data are not read."""
    is_zip = zipfile.is_zipfile(path)
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=is_zip)
    except Exception as error:  # of many types; torch's advice is to trust the file
        raise FileError(
            f"{path} holds more than tensors, which could run code, or is damaged"
        ) from error
