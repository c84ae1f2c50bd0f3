"""Finding what has become NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn


def find_nonfinite(metrics: Mapping[str, Tensor]) -> str | None:
    """The first metric that is NaN or infinite, with its value; None if all are finite."""
    for name, value in metrics.items():
        if not math.isfinite(value.item()):
            return f"{name} is {value.item()}"
    return None


def find_nonfinite_gradient(model: nn.Module) -> str:
    """The name of the first parameter whose gradient is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return name
    return "a parameter"  # DeepSpeed has dropped the gradients by now
