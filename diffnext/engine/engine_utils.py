"""Small tools around modules, devices and seeds."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from diffnext.utils.device_utils import get_device as get_device  # users import it from here

_COUNT_UNITS = {"M": 1e6, "B": 1e9}
_NORM_CLASSES = (nn.BatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm, nn.LayerNorm)


def count_params(module: nn.Module, trainable: bool = True, unit: str = "M") -> float:
    """Count parameters.

    Args:
        module: Module to count.
        trainable: Count only parameters that require a gradient.
        unit: "M" for millions, "B" for billions.
    """
    counted = [p.numel() for p in module.parameters() if p.requires_grad or not trainable]
    return sum(counted) / _COUNT_UNITS[unit]


def freeze_module(module: nn.Module, trainable: bool = False) -> nn.Module:
    """Switch the gradients of all parameters of a module off, or on.

    Args:
        module: Module to change.
        trainable: Whether its parameters shall require a gradient.

    Returns:
        The module.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)
    return module


def manual_seed(
    seed: int, device_and_seed: tuple[int | torch.device | None, int] | None = None
) -> None:
    """Seed every random number generator a run draws from.

    Args:
        seed: Seed of torch, the same on every rank.
        device_and_seed: Device (or CUDA index; None for the CPU) and seed of this rank: given to
            that device's generator, to NumPy and to Python's ``random``.
    """
    torch.manual_seed(seed)
    device, device_seed = device_and_seed if device_and_seed is not None else (None, seed)
    random.seed(device_seed)
    np.random.seed(device_seed % 2**32)
    device = torch.device("cpu") if device is None else torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(device_seed)
    elif device.type == "mps":
        torch.mps.manual_seed(device_seed)
    else:
        # On the CPU the global generator is the device's: ranks must not draw the same noise.
        torch.default_generator.manual_seed(device_seed)


def synchronize_device(device: torch.device) -> None:
    """Wait until a device has finished its queued work; a no-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def load_weights(
    module: nn.Module, file: str | os.PathLike, prefix_removed: str = "", strict: bool = True
) -> None:
    """Load a file of weights into a module.

    Args:
        module: Module to fill.
        file: A ``.safetensors`` file or a torch file holding tensors only; an empty name does
            nothing.
        prefix_removed: Leading text to strip from the names that have it.
        strict: Whether names must match exactly.

    Raises:
        ValueError: For a ``.pkl`` file: unpickling runs code from the file.
        RuntimeError: If names or shapes do not match.
    """
    if not file:
        return
    path = os.fspath(file)
    if path.endswith(".pkl"):
        raise ValueError(f"refusing to unpickle {path}: convert it to .safetensors first")
    state = read_weights(path)
    renamed = {name.removeprefix(prefix_removed): value for name, value in state.items()}
    module.load_state_dict(renamed, strict=strict)


def read_weights(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a file of tensors on the CPU without running code from it.

    Args:
        file: A ``.safetensors`` file, or one written by ``torch.save``.
    """
    path = os.fspath(file)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def get_param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Group trainable parameters by their optimizer options.

    A parameter may carry the attributes ``lr_scale`` (factor on the learning rate) and
    ``no_weight_decay``; weights and biases of normalisation layers never decay.

    Args:
        model: Model to train.

    Returns:
        Optimizer groups in order of first appearance; each parameter is in one of them.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            options = _optimizer_options(module, parameter)
            group = groups.setdefault(tuple(options.items()), {**options, "params": []})
            group["params"].append(parameter)
    return list(groups.values())


def _optimizer_options(module: nn.Module, parameter: nn.Parameter) -> dict[str, float]:
    options = {}
    if hasattr(parameter, "lr_scale"):
        options["lr_scale"] = parameter.lr_scale
    if getattr(parameter, "no_weight_decay", False) or isinstance(module, _NORM_CLASSES):
        options["weight_decay"] = 0
    return options
