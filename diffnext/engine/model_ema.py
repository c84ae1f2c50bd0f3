"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ModelEMA:
    """A float32 copy of a model that follows its weights slowly.

    Args:
        model: Model to copy. Parameters that require a gradient become float32, buffers keep their
            dtype.
        decay: Share of the old average kept at an update, in [0, 1].
        update_every: Steps between updates; the trainer counts them.
        device: "cpu" moves the copy to main memory, "gpu" leaves it where the model is.

    Raises:
        ValueError: If ``decay`` or ``device`` is out of range.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.99, update_every: int = 100, device: str = "gpu"
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ema decay must be in [0, 1], got {decay}")
        if update_every < 1:
            raise ValueError(f"ema update_every must be at least 1, got {update_every}")
        if device not in ("cpu", "gpu"):
            raise ValueError(f'ema device must be "cpu" or "gpu", got {device!r}')
        self.decay = decay
        self.update_every = update_every
        self.model = copy_module(model).eval()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
        if device == "cpu":
            self.model.cpu()

    def update(self, model: nn.Module) -> None:
        """Move the average toward a model: ema = decay * ema + (1 - decay) * live.

        Args:
            model: Model of the same structure; only its trainable parameters are followed.
        """
        self.update_from((parameter, parameter) for parameter in model.parameters())

    @torch.no_grad()
    def update_from(self, parameters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Move the average toward values kept outside the model, such as master weights.

        Args:
            parameters: For every parameter of the model, in order: the parameter and its value.

        Raises:
            ValueError: If their number differs from the model's, or a value is not finite; the
                average of that parameter is unchanged then. All values are read first: getting
                them may be collective.
        """
        not_finite = []
        bucket = _Bucket(1 - self.decay)
        for average, (parameter, value) in zip(self.model.parameters(), parameters, strict=True):
            if parameter.requires_grad:
                not_finite += bucket.add(average, value.detach())
        not_finite += bucket.flush()
        if not_finite:
            raise ValueError(f"{len(not_finite)} weights are not finite, one of {not_finite[0]}")


class _Bucket:
    """Averages some parameters at a time: few launches, little memory.

    Args:
        weight: Share of the new value in an average.
    """

    MAX_ELEMENTS = 2**24

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.averages: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_elements = 0

    def add(self, average: Tensor, value: Tensor) -> list[tuple[int, ...]]:
        """Take a parameter; returns the shapes of those averaged now that are not finite."""
        is_other_place = bool(self.values) and self.values[0].device != value.device
        is_full = self.num_elements + value.numel() > self.MAX_ELEMENTS
        not_finite = self.flush() if is_other_place or is_full else []
        self.averages.append(average)
        self.values.append(value.float())
        self.num_elements += value.numel()
        return not_finite

    def flush(self) -> list[tuple[int, ...]]:
        """Average what was taken and is finite; returns the shapes of what is not."""
        if not self.values:
            return []
        largest = torch.stack(torch._foreach_norm(self.values, float("inf")))
        is_finite = largest.isfinite().tolist()
        pairs = list(zip(self.averages, self.values, is_finite, strict=True))
        kept = [(average, value) for average, value, good in pairs if good]
        if kept:
            averages, values = (list(column) for column in zip(*kept, strict=True))
            # The arithmetic runs on the live device: with the average on the CPU, moving tensors
            # there and back is far cheaper than lerping them on the CPU.
            moved = [average.to(values[0].device, torch.float32) for average in averages]
            torch._foreach_lerp_(moved, values, self.weight)
            for average, result in zip(averages, moved, strict=True):
                if result.data_ptr() != average.data_ptr():
                    average.copy_(result)
        self.averages, self.values, self.num_elements = [], [], 0
        return [tuple(value.shape) for _, value, good in pairs if not good]


def copy_module(model: nn.Module, with_weights: bool = True) -> nn.Module:
    """Copy parameters, buffers and submodules; share everything else.

    Pipelines hang the text encoder and themselves on the model as plain attributes: copying those
    would double the memory of a run.

    Args:
        model: Module to copy.
        with_weights: Whether parameters have values; else they are on the meta device.
    """
    own = vars(nn.Module()).keys()
    copies: dict[int, Any] = {
        id(value): value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in own
    }
    if not with_weights:
        copies |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, copies)
