"""Release folders: where each component of a pipeline comes from and which class loads it.

A release folder holds ``model_index.json`` and a folder for each component. The index names a
component's class as ``[library, class]``; the library is a package, a dotted module, or a shim
such as ``__vae__`` for a file ``vae/__vae__.py`` that imports the class. A checkpoint written by
training holds its own components only and names the folders of the others in ``base_folder.json``.

A folder is not trusted: components have plain names and lie in the folder, or where
``base_folder.json`` says; their classes come from diffusers, transformers or this package; and
shims are read, not run. Only ``trust_remote_code=True`` runs Python files of a folder.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffnext.models.modeling_utils import MODEL_MODULES
from diffnext.utils.component_files import (
    BASE_FOLDER_FILE,
    INDEX_FILE,
    is_plain_name,
    own_path,
    read_base_reference,
)
from diffnext.utils.json_files import FileError, read_json, write_json

__all__ = [
    "BASE_FOLDER_FILE",
    "INDEX_FILE",
    "LIBRARIES",
    "LORA_FILE",
    "SCHEDULER_MODULES",
    "component_class",
    "component_places",
    "find_component",
    "read_base_reference",
    "read_class_name",
    "read_index",
    "resolve_index",
    "write_base_reference",
    "write_shim",
]

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
SCHEDULER_MODULES = {
    "FlowMatchEulerDiscreteScheduler": "diffnext.schedulers.scheduling_cfm",
    "DDPMScheduler": "diffnext.schedulers.scheduling_ddpm",
}
LIBRARIES = ("diffusers", "transformers", *MODEL_MODULES.values(), *SCHEDULER_MODULES.values())


def write_base_reference(folder: Path, base: Path, components: Mapping[str, Path]) -> None:
    """Name the folders that :func:`read_base_reference` finds."""
    elsewhere = {name: str(path) for name, path in components.items()}
    content = {"base_folder": str(base), "components": elsewhere}
    write_json(folder / BASE_FOLDER_FILE, content)


def component_places(folder: Path, name: str) -> list[Path]:
    """Where a component may be, the first that exists counts: in the folder itself, then its base.

    Args:
        folder: Release folder or training checkpoint.
        name: The component's name.

    Raises:
        FileError: If the name is a path, or the folder has a link of that name that leads out.
    """
    if not is_plain_name(name):
        raise FileError(f"{folder}: a component must have a plain name such as vae, got {name!r}")
    base, elsewhere = read_base_reference(folder)
    places = [own_path(folder, name), elsewhere.get(name), base and own_path(base, name)]
    return [place for place in places if place is not None]


def find_component(folder: Path, name: str) -> Path | None:
    """The folder of a component; None if there is none. See :func:`component_places`."""
    return next((place for place in component_places(folder, name) if place.is_dir()), None)


def read_index(file: Path) -> dict[str, Any]:
    """The index of a release folder, with plain names and entries of the right form.

    Args:
        file: Its ``model_index.json``.

    Returns:
        Its content; ``[library, class]`` by name for the components.

    Raises:
        FileError: If it is damaged, or a name or an entry has another form.
        FileNotFoundError: If there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not a pipeline folder: it has no {file.name}")
    index = read_json(file)
    if not isinstance(index.get("_class_name"), str | None):
        raise FileError(f"{file}: _class_name must be a text, got {index['_class_name']!r}")
    for name, value in index.items():
        if name.startswith("_") or isinstance(value, bool | int | float | None):
            continue
        if not is_plain_name(name):
            raise FileError(f"{file}: a component must have a plain name such as vae, got {name!r}")
        is_entry = isinstance(value, list) and len(value) == 2
        if not is_entry or not (value[0] is None or all(isinstance(one, str) for one in value)):
            raise FileError(f"{file}: {name} must be [library, class], got {value!r}")
    return index


def read_class_name(folder: Path) -> str | None:
    """The pipeline class of a release folder, with or without a module in the index."""
    name = read_index(own_path(folder, INDEX_FILE)).get("_class_name")
    return None if name is None else name.rpartition(".")[2]


def resolve_index(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The index of a release folder with shims replaced by the modules of their classes.

    Args:
        folder: Release folder or training checkpoint.
        trust_remote_code: Whether other shims and libraries may stay, whose code diffusers runs.

    Raises:
        FileError: If the index names foreign code without permission, or is damaged.
        FileNotFoundError: If the folder has no index.
    """
    index = read_index(own_path(folder, INDEX_FILE))
    for name, value in index.items():
        if not isinstance(value, list) or value[0] is None:
            continue
        component = find_component(folder, name)
        library = _resolved_library(component, *value)
        if library not in LIBRARIES and not trust_remote_code:
            shim = _shim(component, library)
            place = folder / INDEX_FILE if shim is None else shim
            raise FileError(
                f"{place} names foreign code as {name}, {library}.{value[1]}: if you trust it, "
                "load the folder with trust_remote_code=True"
            )
        index[name] = [library, value[1]]
    return index


def _resolved_library(component: Path | None, library: str, class_name: str) -> str:
    """The module of this package that a shim imports the class from; others stay as they are."""
    if not library.startswith("__"):
        return library
    shim = _shim(component, library)
    is_harmless = shim is None or _only_imports(shim, class_name)
    return MODEL_MODULES.get(class_name, library) if is_harmless else library


def _shim(component: Path | None, library: str) -> Path | None:
    """The Python file of a component that diffusers would run for a library of that name."""
    if component is None or not is_plain_name(library):
        return None
    shim = own_path(component, f"{library}.py")
    return shim if shim.is_file() else None


def _only_imports(shim: Path, class_name: str) -> bool:
    """Whether a shim only imports the class from its module in this package; it is not run."""
    try:
        statements = ast.parse(shim.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names: set[str] = set()
    for statement in statements:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_all = (
            isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        )
        if is_docstring or is_all:
            continue
        if not isinstance(statement, ast.ImportFrom) or statement.module not in LIBRARIES:
            return False
        names |= {alias.name for alias in statement.names if not alias.asname}
    return class_name in names


def component_class(entry: tuple[str, str] | list[str], base: type | tuple[type, ...]) -> type:
    """The class that an entry of a resolved index names.

    Args:
        entry: Library, one of :data:`LIBRARIES`, and class.
        base: Its base class, or several of which it must have one.

    Raises:
        FileError: If there is no such class, or it is another kind of component.
    """
    library, name = entry
    found = getattr(importlib.import_module(library), name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise FileError(f"{library} has no such component: {name!r}")
    return found


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
