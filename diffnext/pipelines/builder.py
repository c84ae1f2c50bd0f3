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

from diffnext.pipelines.release_folder import (
    BASE_FOLDER_FILE,
    INDEX_FILE,
    LORA_FILE,
    find_folder,
    link_component,
    link_release_folder,
)
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from diffnext.utils.json_files import read_json, write_json

__all__ = ["build_diffusion_scheduler", "build_pipeline", "get_pipeline_path"]

logger = logging.getLogger(__name__)

_SCHEDULERS = {cls.__name__: cls for cls in (FlowMatchEulerDiscreteScheduler, DDPMScheduler)}


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
    """
    if module_dict is None and module_config is None:
        return str(pretrained_path)
    folder = find_folder(pretrained_path)
    source = _complete(folder)
    module_paths = {
        name: _relocate(path, folder, source) for name, path in (module_dict or {}).items()
    }
    index_file = Path(module_paths.pop("model_index", None) or source / INDEX_FILE)
    if not index_file.is_file():
        raise FileNotFoundError(f"there is no model index at {index_file}")
    index = read_json(index_file)
    dropped = [name for name, path in module_paths.items() if not path]
    components = _component_folders(source, module_paths)
    target = Path(target_path).absolute() if target_path else _temporary_folder()
    target.mkdir(parents=True, exist_ok=True)
    for name, component in components.items():
        overlay = _plain((module_config or {}).get(name))
        link_component(component, target / name, replaced=["config.json"] if overlay else [])
        if overlay:
            _write_overlaid_config(name, component, target / name, overlay)
    write_json(target / INDEX_FILE, {k: v for k, v in index.items() if k not in dropped})
    return str(target)


def _complete(folder: Path) -> Path:
    """The folder itself, or a training checkpoint joined with its base folder.

    Raises:
        ValueError: If the checkpoint holds adapters in the place of a model.
    """
    if not (folder / BASE_FOLDER_FILE).exists():
        return folder
    if (folder / LORA_FILE).exists():
        raise ValueError(f"{folder} holds adapters only: merge them first (scripts/merge_lora.py)")
    joined = _temporary_folder()
    link_release_folder(folder, joined, read_json(folder / INDEX_FILE))
    return joined


def _relocate(path: Any, folder: Path, source: Path) -> Any:
    """A path inside ``folder`` as one inside ``source``; configs name parts of their folder."""
    if path and Path(path).expanduser().absolute().is_relative_to(folder):
        return source / Path(path).expanduser().absolute().relative_to(folder)
    return path


def _component_folders(source: Path, module_paths: dict[str, Any]) -> dict[str, Path]:
    """Where each component comes from; a path in ``module_paths`` wins."""
    folders = {entry.name: entry for entry in sorted(source.iterdir()) if entry.is_dir()}
    for name, path in module_paths.items():
        if not path:
            folders.pop(name, None)
            continue
        folders[name] = Path(path).expanduser().absolute()
        if not folders[name].is_dir():
            raise FileNotFoundError(f"module_dict.{name}: there is no folder {path}")
    return folders


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


def _write_overlaid_config(name: str, folder: Path, target: Path, overlay: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    for key, value in overlay.items():
        if key in config and not _is_same(config[key], value):
            logger.warning(
                "%s: %s is %s in %s and %s in the training config, which wins; weights of "
                "another shape will be refused",
                name,
                key,
                json.dumps(config[key]),
                path,
                json.dumps(value),
            )
    write_json(target / "config.json", {**config, **overlay})


def _is_same(old: Any, new: Any) -> bool:
    """Whether two config values mean the same; a side stands for a square."""
    if isinstance(old, int) and isinstance(new, list):
        return new == [old] * len(new)
    return old == new


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
        dtype: Dtype of its models, or one a component with ``default`` for the rest.
        **kwargs: For ``from_pretrained``; win over the two defaults.
    """
    dtype = kwargs.pop("torch_dtype", dtype)
    options = {"trust_remote_code": True, "dtype": dtype, **kwargs}
    return pipe_cls.from_pretrained(str(pretrained_path), **options)


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
    name: str | None
    if hasattr(scheduler_path, "config"):
        config = dict(scheduler_path.config)
        name = type(scheduler_path).__name__
    else:
        file = Path(scheduler_path) / "scheduler_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no scheduler config at {file}")
        config = read_json(file)
        wanted = "_sample_class_name" if sample else "_noise_class_name"
        name = config.get(wanted) or config.get("_class_name")
    if name is None or name not in _SCHEDULERS:
        raise ValueError(f"scheduler must be one of {sorted(_SCHEDULERS)}, got {name}")
    return _SCHEDULERS[name].from_config({**config, **kwargs})
