"""Build pipelines and schedulers from folders and configs."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffnext.pipelines.release_folder import (
    BASE_FOLDER_FILE,
    INDEX_FILE,
    LORA_FILE,
    SCHEDULER_MODULES,
    component_class,
    component_places,
    find_component,
    read_index,
    write_base_reference,
)
from diffnext.utils.component_files import component_files, own_path, reading
from diffnext.utils.folders import find_folder
from diffnext.utils.json_files import read_json, same_value, write_json

__all__ = ["build_diffusion_scheduler", "build_pipeline", "get_pipeline_path"]

logger = logging.getLogger(__name__)


def get_pipeline_path(
    pretrained_path: str | os.PathLike,
    module_dict: Any = None,
    module_config: Any = None,
    target_path: str | os.PathLike | None = None,
) -> str:
    """A folder with components and configs replaced, by links; nothing is copied or changed.

    Args:
        pretrained_path: Release folder or Hub id.
        module_dict: Folder of each component to take from elsewhere; a falsy one drops the
            component. ``model_index`` names the index file.
        module_config: Values that overlay the config.json of each component.
        target_path: Where to assemble; a temporary folder, removed at exit, when None.

    Returns:
        ``pretrained_path`` itself when there is nothing to replace, else the assembled folder.

    Raises:
        FileNotFoundError: If a folder or the index is missing.
        FileError: If a folder is not to be trusted: a name that is a path, a link that leads out,
            damaged files.
    """
    if module_dict is None and module_config is None:
        return str(pretrained_path)
    folder = find_folder(pretrained_path)
    if (folder / BASE_FOLDER_FILE).exists() and (folder / LORA_FILE).exists():
        raise ValueError(f"{folder} holds adapters only: merge them first (diffnext lora merge)")
    modules = dict(module_dict or {})
    index = read_index(_absolute(modules.pop("model_index", None) or own_path(folder, INDEX_FILE)))
    dropped = [name for name, path in modules.items() if not path]
    index = {name: value for name, value in index.items() if name not in dropped}
    components = {
        name: find_component(folder, name)
        for name, value in index.items()
        if isinstance(value, list)
    }
    for name, path in modules.items():
        if path:
            components[name] = _replacement(name, _absolute(path), folder)
    target = Path(target_path).absolute() if target_path else _temporary_folder()
    target.mkdir(parents=True, exist_ok=True)
    for name, component in components.items():
        if component is not None:
            _link_component(component, target / name, _plain((module_config or {}).get(name)))
    write_json(target / INDEX_FILE, index)
    return str(target)


def _absolute(path: str | os.PathLike) -> Path:
    return Path(path).expanduser().absolute()


def _replacement(name: str, place: Path, folder: Path) -> Path:
    """The folder that ``module_dict`` gives for a component.

    Configs name parts of their own base folder, which a training checkpoint has elsewhere.
    """
    component_places(folder, name)  # checks the name
    found = find_component(folder, place.name) if place.parent == folder else place
    if found is None or not found.is_dir():
        raise FileNotFoundError(f"module_dict.{name}: there is no folder {place}")
    return found


def _link_component(source: Path, target: Path, overlay: dict[str, Any]) -> None:
    """Make ``target`` a real folder of links to the files of ``source``, and name that its base.

    Args:
        source: Folder of one component.
        target: Folder to fill; files that exist stay, links are made again.
        overlay: Values to lay over config.json, or a scheduler's scheduler_config.json.
    """
    files = component_files(source)
    if target.is_symlink():
        target.unlink()
    target.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.symlink_to(file)
    write_base_reference(target, source.absolute(), {})
    if overlay:
        is_scheduler = "scheduler_config.json" in files
        name = "scheduler_config.json" if is_scheduler else "config.json"
        config = read_json(source / name) if name in files else {}
        _report_differences(target.name, source / name, config, overlay)
        write_json(target / name, {**config, **overlay})


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="diffnext-pipeline-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _plain(config: Any) -> dict[str, Any]:
    """A config container as plain JSON values."""
    if not config:
        return {}
    if isinstance(config, dict):
        return config
    from omegaconf import OmegaConf

    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))


def _report_differences(
    name: str, path: Path, config: dict[str, Any], overlay: dict[str, Any]
) -> None:
    """Warn of values of a component's config that the training config replaces."""
    for key, value in overlay.items():
        if key in config and not same_value(config[key], value):
            logger.warning(
                "%s: %s is %s in %s and %s in the training config, which wins; weights of "
                "another shape will be an error",
                name,
                key,
                json.dumps(config[key]),
                path,
                json.dumps(value),
            )


def build_pipeline(
    pretrained_path: str | os.PathLike,
    pipe_cls: Any,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float16,
    **kwargs: Any,
) -> Any:
    """Load a pipeline.

    Args:
        pretrained_path: Release folder or Hub id.
        pipe_cls: Pipeline class.
        dtype: Type of its models, or one per component with ``default`` for the rest.
        **kwargs: For ``from_pretrained``, such as ``trust_remote_code``.
    """
    dtype = kwargs.pop("torch_dtype", dtype)
    return pipe_cls.from_pretrained(str(pretrained_path), **{"dtype": dtype, **kwargs})


def build_diffusion_scheduler(scheduler_path: Any, sample: bool = False, **kwargs: Any) -> Any:
    """Diffnext's scheduler of the same name and config.

    Args:
        scheduler_path: A scheduler, the folder of one, or None.
        sample: For folders whose config names two classes, whether to take the sampling one
            (``_sample_class_name``) or the one that adds noise (``_noise_class_name``).
        **kwargs: Config values that win.

    Returns:
        A scheduler, or None for None.

    Raises:
        FileNotFoundError: If the folder holds no scheduler config.
        ValueError: If diffnext has no scheduler of that name.
    """
    if scheduler_path is None:
        return None
    if hasattr(scheduler_path, "config"):
        # Of those that it took by default from_config would drop the values that win.
        config = {n: v for n, v in scheduler_path.config.items() if n != "_use_default_values"}
        name: Any = type(scheduler_path).__name__
        scheduler_path = "the scheduler"  # in messages
    else:
        file = Path(scheduler_path) / "scheduler_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no scheduler config at {file}")
        config = read_json(file)
        wanted = "_sample_class_name" if sample else "_noise_class_name"
        name = config.get(wanted) or config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULER_MODULES:
        raise ValueError(f"scheduler must be one of {sorted(SCHEDULER_MODULES)}, got {name}")
    found: Any = component_class((SCHEDULER_MODULES[name], name), SchedulerMixin)
    with reading(scheduler_path, name):
        return found.from_config({**config, **kwargs})
