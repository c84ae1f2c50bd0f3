"""What all pipelines share: loading, registering components, outputs."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn

from diffnext.models.modeling_utils import StrictLoadingMixin, check_savable
from diffnext.pipelines.release_folder import (
    INDEX_FILE,
    LIBRARIES,
    LORA_FILE,
    component_class,
    component_places,
    find_component,
    resolve_index,
)
from diffnext.utils.component_files import component_files, reading
from diffnext.utils.folders import HUB_ARGUMENTS, find_folder
from diffnext.utils.json_files import FileError, write_json

__all__ = ["NOVAPipelineOutput", "PipelineMixin", "cosine_set_sizes"]


@dataclass
class NOVAPipelineOutput(BaseOutput):
    """Result of a pipeline; only the field that was produced is a key.

    Attributes:
        images: Pictures: a list of PIL images, uint8 (B, H, W, 3), or a tensor (B, 3, H, W).
        frames: Videos: uint8 (B, F, H, W, 3) or a tensor (B, 3, F, H, W); also latents of
            pictures and videos, (B, C, T, h, w).
    """

    images: Any = None
    frames: Any = None


class PipelineMixin(DiffusionPipeline):
    """diffusers' base of pipelines; loads release folders."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Load a release folder, a training checkpoint or a Hub repository.

        Shims that only name classes of this package are followed without running them, so only
        foreign code needs ``trust_remote_code``.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As for diffusers' ``DiffusionPipeline.from_pretrained``: ``dtype``,
                ``trust_remote_code``, components to use instead, ...

        Raises:
            FileNotFoundError: If the folder or one of its components is missing.
            FileError: If a file of it is damaged, leads elsewhere, or would run code.
            RuntimeError: If weights do not fit their model; the message lists them.
            ValueError: If it holds adapters, and the pipeline is one that trains.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = find_folder(pretrained_model_name_or_path, **hub_kwargs)
        index = resolve_index(folder, bool(kwargs.get("trust_remote_code")))
        kinds = cls._get_signature_types()
        parts = {
            name: _read_part(folder, name, index.get(name), kinds[name])
            for name in cls._optional_components
            if name not in kwargs
        }
        # Models are left to diffusers, for dtypes, devices and quantisation.
        with tempfile.TemporaryDirectory(prefix="diffnext-") as assembled:
            entries = {name: index[name] for name, part in parts.items() if part is not None}
            write_json(Path(assembled, INDEX_FILE), {**entries, "_class_name": cls.__name__})
            for name in entries:
                if isinstance(parts[name], Path):
                    Path(assembled, name).symlink_to(parts[name].resolve())
                else:
                    kwargs[name] = parts[name]
            pipeline = super().from_pretrained(assembled, **kwargs)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        if (folder / LORA_FILE).is_file():
            if not hasattr(pipeline, "load_lora_weights"):
                raise ValueError(f"{folder} holds adapters: merge them first (diffnext lora merge)")
            pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
        return pipeline

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the index and all components, or nothing if one of them cannot be saved.

        Args:
            save_directory: The folder.
            *args: As for diffusers' method.
            **kwargs: As for diffusers' method.

        Raises:
            ValueError: If a model is quantised or has adapters.
        """
        for component in self.components.values():
            if isinstance(component, StrictLoadingMixin):
                check_savable(component)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of the components of another, which they share.

        Args:
            pipeline: The other one, of any class.
            **kwargs: Components to use instead, and ``dtype`` or ``torch_dtype`` to cast all
                models to, including the other pipeline's; by default each keeps its own.
        """
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        names = cls._get_signature_keys(cls)[0]
        result = cls(**{name: getattr(pipeline, name, None) for name in names} | kwargs)
        return result if dtype is None else result.to(dtype=dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a component that was absent is registered, so it is saved."""
        is_absent = getattr(self, "config", {}).get(name) == (None, None)
        if is_absent and value is not None:
            self.register_modules(**{name: value})
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; a component becomes None, like one that is absent."""
        if name in self._optional_components:
            setattr(self, name, None)
        else:
            super().__delattr__(name)

    def to_json_string(self) -> str:
        """What is saved as the index; the class is named with its module, which users import."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = f"{type(self).__module__}.{type(self).__name__}"
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def register_module(self, model_or_path: Any, name: str) -> Any:
        """Record one component, see :meth:`register_modules`.

        Args:
            model_or_path: The component, or None.
            name: Its name.

        Returns:
            The component.
        """
        self.register_modules(**{name: model_or_path})
        return model_or_path

    def register_modules(self, **components: Any) -> None:
        """Make components attributes, so saving and moving the pipeline includes them.

        Args:
            **components: Components by name; None for an absent one.

        Raises:
            TypeError: For a path: load the component with its class first.
        """
        for name, component in components.items():
            if isinstance(component, (str, os.PathLike)):
                raise TypeError(
                    f"{name} must be an object, got the path {str(component)!r}: load it with "
                    "its class's from_pretrained"
                )
        super().register_modules(**components)


def _read_part(folder: Path, name: str, entry: Any, kinds: tuple[type, ...]) -> Any:
    """A component: the folder of a model, a tokenizer or scheduler itself, None if absent.

    Args:
        folder: Release folder or training checkpoint.
        name: The component's name.
        entry: Its library and class in the resolved index.
        kinds: Its class must be a subclass of one of these.
    """
    if entry is None or (isinstance(entry, list) and entry[0] is None):
        return None
    if not isinstance(entry, list):
        raise FileError(f"{folder / INDEX_FILE}: {name} must be [library, class], got {entry!r}")
    component = find_component(folder, name)
    if component is None:
        places = [str(place) for place in component_places(folder, name)]
        raise FileNotFoundError(f"component {name!r} of {folder} is in none of {places}")
    component_files(component)
    if entry[0] not in LIBRARIES:
        return component
    kind: Any = component_class(entry, kinds)
    if issubclass(kind, nn.Module):
        return component
    with reading(component, kind.__name__):
        return kind.from_pretrained(component)


def cosine_set_sizes(num_steps: int, num_tokens: int) -> np.ndarray:
    """How many tokens each autoregressive step predicts (MaskGIT, arXiv:2202.04200).

    Args:
        num_steps: Number of steps, at least 1.
        num_tokens: Tokens of a frame.

    Returns:
        (num_steps,) int64, growing along a cosine, sum ``num_tokens``; small frames in many
        steps have zeros.
    """
    hidden = np.cos(0.5 * np.pi * np.arange(num_steps + 1) / num_steps) * num_tokens
    hidden = np.round(hidden).astype(np.int64)
    return hidden[:-1] - hidden[1:]
