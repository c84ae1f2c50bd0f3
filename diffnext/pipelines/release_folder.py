"""Release folders: where each component of a pipeline comes from and which class loads it.

A release folder holds ``model_index.json`` and a folder for each component. The index names a
component's class as ``[library, class]``; the library is a package, a dotted module, or a shim
such as ``__vae__`` for a file ``vae/__vae__.py`` that imports the class. A checkpoint written by
training holds its own components only and names the folders of the others in ``base_folder.json``.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffnext.models.modeling_utils import MODEL_MODULES
from diffnext.utils.json_files import read_json, write_json

__all__ = [
    "BASE_FOLDER_FILE",
    "INDEX_FILE",
    "LORA_FILE",
    "component_places",
    "find_folder",
    "import_libraries",
    "link_component",
    "link_release_folder",
    "read_base_reference",
    "read_class_name",
    "resolve_index",
    "write_base_reference",
    "write_shim",
]

INDEX_FILE = "model_index.json"
BASE_FOLDER_FILE = "base_folder.json"
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it


def find_folder(path_or_id: str | os.PathLike, **hub_kwargs: Any) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository.

    Args:
        path_or_id: Folder or Hub id.
        **hub_kwargs: ``cache_dir``, ``revision``, ``token``, ``local_files_only`` and such, for
            ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: If it is neither a folder nor shaped like a Hub id.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder.absolute()
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is neither a folder nor a Hub id such as BAAI/nova-...")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, **hub_kwargs))


def link_component(source: Path, target: Path, replaced: Iterable[str] = ()) -> None:
    """Make ``target`` a real folder of links to the entries of ``source``.

    Args:
        source: Folder of one component.
        target: Folder to fill; entries that exist stay.
        replaced: Names to leave out, because the caller writes them.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        link = target / entry.name
        if entry.name not in replaced and not link.exists():
            link.unlink(missing_ok=True)  # a dangling link of an earlier run
            link.symlink_to(entry.resolve())


def read_base_reference(folder: Path) -> tuple[Path | None, dict[str, Path]]:
    """Where a training checkpoint has its other components.

    Args:
        folder: Any release folder.

    Returns:
        Its base folder, None if it is complete in itself, and components that are elsewhere.
    """
    file = folder / BASE_FOLDER_FILE
    if not file.is_file():
        return None, {}
    content = read_json(file)
    components = {name: Path(path) for name, path in content.get("components", {}).items()}
    return Path(content["base_folder"]), components


def write_base_reference(folder: Path, base: Path, components: Mapping[str, Path]) -> None:
    """Name the folders that :func:`read_base_reference` finds."""
    elsewhere = {name: str(path) for name, path in components.items()}
    content = {"base_folder": str(base), "components": elsewhere}
    write_json(folder / BASE_FOLDER_FILE, content)


def component_places(folder: Path, name: str) -> list[Path]:
    """Where a component may be, the first that exists counts: in the folder itself, then its base.

    Args:
        folder: Release folder or training checkpoint.
        name: Of the component.
    """
    base, elsewhere = read_base_reference(folder)
    places = [folder / name, elsewhere.get(name), None if base is None else base / name]
    return [place for place in places if place is not None]


def link_release_folder(source: Path, target: Path, index: dict[str, Any]) -> None:
    """Assemble a release folder of links to ``source`` and its base folder, with another index.

    Args:
        source: Release folder or training checkpoint.
        target: Folder to fill.
        index: Content of its ``model_index.json``.
    """
    for name, value in index.items():
        if not isinstance(value, (list, tuple)):
            continue
        folders = component_places(source, name)
        component = next((folder for folder in folders if folder.is_dir()), None)
        if component is None and value[0] is not None:
            raise FileNotFoundError(
                f"component {name!r} of {source} is in none of {[str(f) for f in folders]}"
            )
        if component is not None:
            link_component(component, target / name)
    write_json(target / INDEX_FILE, index)


def read_class_name(folder: Path) -> str | None:
    """The pipeline class of a release folder, with or without a module in the index."""
    name = read_json(folder / INDEX_FILE).get("_class_name")
    return None if name is None else name.rpartition(".")[2]


def resolve_index(folder: Path) -> dict[str, Any]:
    """The index of a release folder with shims replaced by the modules of their classes.

    Shims that do more than import a class of this package stay: diffusers loads those, and asks
    for ``trust_remote_code=True``.

    Raises:
        FileNotFoundError: If the folder has no index.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no pipeline folder: it has no {INDEX_FILE}")
    index = read_json(path)
    return {
        name: _resolve_entry(folder / name, value) if isinstance(value, list) else value
        for name, value in index.items()
    }


def _resolve_entry(component: Path, entry: list[Any]) -> list[Any]:
    library, class_name = entry
    if not isinstance(library, str) or not library.startswith("__"):
        return entry
    shim = component / f"{library}.py"
    if shim.is_file():
        module = _imported_module(shim.read_text(encoding="utf-8"), class_name)
    else:
        module = MODEL_MODULES.get(class_name)
    return entry if module is None else [module, class_name]


def _imported_module(source: str, class_name: str) -> str | None:
    """The module of this package that a shim takes the class from; None if it does more."""
    module = None
    for statement in ast.parse(source).body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_all = (
            isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        )
        if is_docstring or is_all:
            continue
        if not isinstance(statement, ast.ImportFrom) or statement.level:
            return None
        if not (statement.module or "").startswith("diffnext."):
            return None
        if any(alias.name == class_name and not alias.asname for alias in statement.names):
            module = statement.module
    return module


def import_libraries(index: dict[str, Any]) -> None:
    """Import the modules of this package that an index names; diffusers looks among imported."""
    for value in index.values():
        library = value[0] if isinstance(value, (list, tuple)) else None
        if isinstance(library, str) and library.startswith("diffnext."):
            importlib.import_module(library)


def write_shim(folder: Path, component: str, class_name: str) -> str:
    """Write the file that lets diffusers find a component's class.

    Args:
        folder: Folder of the component.
        component: Its name, such as ``vae``.
        class_name: Its class, one of this package.

    Returns:
        The library name for ``model_index.json``, such as ``__vae__``.
    """
    library = f"__{component}__"
    statement = f"from {MODEL_MODULES[class_name]} import {class_name}"
    source = f'"""The class of this component."""\n\n{statement}\n'
    (folder / f"{library}.py").write_text(source, encoding="utf-8")
    return library
