"""What a model returns in a step: its loss, its metrics, and what of them is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = "a parameter"


def total_loss(outputs: Mapping[str, Any], weights: Mapping[str, float]) -> Tensor:
    """Sum the losses among a model's outputs; those without a weight count once.

    Raises:
        ValueError: If none of them can be trained on.
    """
    losses = [
        value * weights.get(name, 1.0)
        for name, value in outputs.items()
        if "loss" in name and isinstance(value, Tensor) and value.requires_grad
    ]
    if not losses:
        raise ValueError(f"the model returned no trainable loss, only {sorted(outputs)}")
    return sum(losses[1:], losses[0])


def detach_metrics(outputs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Pick losses and metrics; they stay on the device until they are reported."""
    return {
        name: torch.as_tensor(value, device=device).detach().float().mean()
        for name, value in outputs.items()
        if "loss" in name or "metric" in name
    }


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """The mean of some scalars."""
    return sum((value / len(values) for value in values[1:]), values[0] / len(values))


def find_nonfinite(metrics: Mapping[str, Tensor]) -> str | None:
    """The first metric that is NaN or infinite, with its value; None if all are finite."""
    for name, value in metrics.items():
        if not math.isfinite(value.item()):
            return f"{name} is {value.item()}"
    return None


def find_nonfinite_gradient(names: Sequence[str], norms: Tensor) -> str:
    """The name of the first parameter whose gradient's norm is NaN or infinite."""
    found = (~norms.isfinite()).tolist()
    return next((name for name, is_bad in zip(names, found, strict=True) if is_bad), UNKNOWN)
