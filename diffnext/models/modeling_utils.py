"""What all networks share: rules of files and types, and the modules of their classes."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffnext.models.quantization import check_not_quantized
from diffnext.utils.component_files import component_files, reading

__all__ = [
    "MODEL_MODULES",
    "StrictLoadingMixin",
    "evaluating",
    "find_model_class",
    "load_strictly",
]

# Homes of the networks, for files that name their classes.
MODEL_MODULES = {
    "NOVATransformer3DModel": "diffnext.models.transformers.transformer_nova",
    "PhiEncoderModel": "diffnext.models.text_encoders.phi",
    "AutoencoderKL": "diffnext.models.autoencoders.autoencoder_kl",
    "AutoencoderKLOpenSora": "diffnext.models.autoencoders.autoencoder_kl_opensora",
    "AutoencoderKLCogVideoX": "diffnext.models.autoencoders.autoencoder_kl_cogvideox",
    "AutoencoderKLLTXVideo": "diffnext.models.autoencoders.autoencoder_kl_ltx",
}

# What `from_pretrained(output_loading_info=True)` reports besides a fitting state dict.
_MISFITS = {
    "missing_keys": "missing from the weights",
    "unexpected_keys": "unknown to the model",
    "mismatched_keys": "of another shape",
}


# Modules in evaluation mode: how many drawings use each, and which parts were training.
_EVALUATED: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_EVALUATED_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the last of several threads restores each part's mode."""
    with _EVALUATED_LOCK:
        count, training = _EVALUATED.get(model, (0, []))
        if count == 0:
            training = [part for part in model.modules() if part.training]
        for part in training:
            part.training = False
        _EVALUATED[model] = (count + 1, training)
    try:
        yield
    finally:
        with _EVALUATED_LOCK:
            count, training = _EVALUATED.pop(model)
            if count > 1:
                _EVALUATED[model] = (count - 1, training)
            else:
                for part in training:
                    part.training = True


def find_model_class(name: str) -> Any:
    """The network class of a name among :data:`MODEL_MODULES`."""
    return getattr(importlib.import_module(MODEL_MODULES[name]), name)


def load_strictly(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model folder; every weight must be present and known.

    Args:
        load: ``from_pretrained`` of a class of diffusers or transformers.
        path: Folder or Hub id.
        *args: Further arguments of ``load``.
        **kwargs: The same.

    Raises:
        FileError: If a file of a local folder is damaged, leads elsewhere or would run code.
        RuntimeError: If any key is missing, unexpected or of another shape; lists them all.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    if os.path.isdir(path):
        path = os.path.realpath(path)
        component_files(Path(path, kwargs.get("subfolder") or ""))
    with reading(path, "a model"):
        model, info = load(path, *args, output_loading_info=True, **kwargs)
    lines = []
    for field, meaning in _MISFITS.items():
        keys = [str(key) for key in info.get(field) or ()]
        if keys:
            lines.append(f"  {len(keys)} {meaning}: {', '.join(sorted(keys))}")
    if lines:
        name = type(model).__name__
        raise RuntimeError(f"The weights in {path} do not fit {name}:\n" + "\n".join(lines))
    return (model, info) if wants_info else model


def check_savable(model: nn.Module) -> None:
    """Check that a model can be loaded again once it is saved.

    Raises:
        ValueError: If its weights are quantised, or adapters change the names of its weights.
    """
    check_not_quantized(model, "saved")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "a model with adapters cannot be saved: call unload_lora_weights(), after fuse_lora() "
            "if they are to stay in its weights"
        )


class StrictLoadingMixin(ModelMixin, ConfigMixin):
    """diffusers' base of networks; weights that do not fit, or cannot be saved, are an error."""

    config_name: Any = ModelMixin.config_name  # diffusers' two bases disagree on its type

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a model folder; see :func:`load_strictly`."""
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model to a folder.

        Args:
            save_directory: The folder.
            *args: As for diffusers' method.
            **kwargs: As for diffusers' method.

        Raises:
            ValueError: If the weights are quantised, or there are adapters.
        """
        check_savable(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every move and every cast comes through here. Quantised weights can only be moved.
        dtype = self.dtype
        if fn(torch.empty(0, dtype=dtype)).dtype != dtype:
            check_not_quantized(self, "cast")
        return super()._apply(fn, recurse)
