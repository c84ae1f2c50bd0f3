"""Small tools around modules, devices and seeds."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from diffnext.utils.device_utils import get_device as get_device  # users import it from here

FilePath = str | os.PathLike

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
    """Switch a module to evaluation mode without gradients, or back to training.

    Args:
        module: Module to change.
        trainable: Whether it is in training mode, and its parameters require a gradient.

    Returns:
        The module.
    """
    return module.train(trainable).requires_grad_(trainable)


def manual_seed(
    seed: int, device_and_seed: tuple[int | torch.device | None, int] | None = None
) -> None:
    """Seed every random number generator a run draws from.

    Args:
        seed: Seed of torch, the same on every rank.
        device_and_seed: Device (or CUDA index; None for the current one) and seed of this rank:
            given to that device's generator, to NumPy and to Python's ``random``. Without it,
            these stay as they are.
    """
    torch.manual_seed(seed)
    if device_and_seed is None:
        return
    device, device_seed = device_and_seed
    random.seed(device_seed)
    np.random.seed(device_seed % 2**32)
    device = device if isinstance(device, torch.device) else get_device(device)
    if device.type == "cpu":
        # The global generator is the device's: ranks must not draw the same noise.
        torch.default_generator.manual_seed(device_seed)
        return
    with torch.accelerator.device_index(device.index):
        torch.get_device_module(device).manual_seed(device_seed)


def synchronize_device(device: torch.device) -> None:
    """Wait until a device has finished its queued work; a no-op on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def load_weights(
    module: nn.Module, weights_file: FilePath, prefix_removed: str = "", strict: bool = True
) -> None:
    """Load a file of weights into a module.

    Args:
        module: Module to fill.
        weights_file: A ``.safetensors`` file or a torch file holding tensors only; an empty name
            does nothing.
        prefix_removed: Leading text to strip from names; weights without it are left out.
        strict: Whether names must match exactly.

    Raises:
        ValueError: For a ``.pkl`` file: unpickling runs code from the file.
        RuntimeError: If names or shapes do not match.
    """
    if not weights_file:
        return
    path = os.fspath(weights_file)
    if path.endswith(".pkl"):
        raise ValueError(f"refusing to unpickle {path}: convert it to .safetensors first")
    start = len(prefix_removed)
    state = {k[start:]: v for k, v in read_weights(path).items() if k.startswith(prefix_removed)}
    module.load_state_dict(state, strict=strict)


def read_weights(file: FilePath) -> dict[str, torch.Tensor]:
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
