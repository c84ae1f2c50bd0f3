"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffnext.utils.host_data import fetch

# Shapes of the values of an update, and whether each value was finite, which waits for the update.
Check: TypeAlias = tuple[list[tuple[int, ...]], Callable[[], Tensor]]
MAX_ELEMENTS = 2**24  # averaged at a time


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
        self._model = copy_module(model).eval()
        self._open_checks: list[Check] = []
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
            if device == "cpu" and parameter.device.type == "cuda":
                parameter.data = parameter.data.cpu().pin_memory()
            parameter.requires_grad_(False)
        if device == "cpu":
            self._model.cpu()

    @property
    def model(self) -> nn.Module:
        """The average, once the updates on their way from the device have arrived."""
        for _, is_finite in self._open_checks:
            is_finite()
        return self._model

    def update(self, model: nn.Module) -> None:
        """Move the average toward a model: ema = decay * ema + (1 - decay) * live.

        Args:
            model: Model of the same structure; only its trainable parameters are followed.

        Raises:
            ValueError: As :meth:`update_from` and :meth:`check`.
        """
        self.update_from((parameter, parameter) for parameter in model.parameters())
        self.check()

    @torch.no_grad()
    def update_from(self, parameters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Move the average toward values kept outside the model, such as master weights.

        Nothing waits for the device. A parameter whose value is NaN or infinite keeps its average,
        and :meth:`check` reports it.

        Args:
            parameters: For every parameter of the model, in order: the parameter and its value.

        Raises:
            ValueError: If their number differs from the model's.
        """
        both = zip(self._model.parameters(), parameters, strict=True)
        pairs = ((average, value.detach()) for average, (p, value) in both if p.requires_grad)
        for averages, values in _in_buckets(pairs):
            self._open_checks.append(_move(averages, values, 1 - self.decay))

    def check(self) -> None:
        """Look at the updates since the last check.

        Raises:
            ValueError: If a value was NaN or infinite.
        """
        checks, self._open_checks = self._open_checks, []
        shapes = []
        for updated, is_finite in checks:
            found = zip(updated, is_finite().tolist(), strict=True)
            shapes += [shape for shape, is_good in found if not is_good]
        if shapes:
            raise ValueError(f"{len(shapes)} weights are not finite, one of {shapes[0]}")


def _in_buckets(
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Averages and float32 values of one device, some at a time: few launches, little memory."""
    averages: list[Tensor] = []
    values: list[Tensor] = []
    for average, value in pairs:
        size = sum(one.numel() for one in values) + value.numel()
        if values and (values[0].device != value.device or size > MAX_ELEMENTS):
            yield averages, values
            averages, values = [], []
        averages.append(average)
        values.append(value.float())
    if values:
        yield averages, values


def _move(averages: list[Tensor], values: list[Tensor], weight: float) -> Check:
    """Give the values a weight in their averages."""
    # The arithmetic runs on the live device: with the average on the CPU, moving tensors there
    # and back is far cheaper than lerping them on the CPU.
    device = values[0].device
    moved = [a.to(device, torch.float32, non_blocking=True) for a in averages]
    is_finite = torch.stack(torch._foreach_norm(values, float("inf"))).isfinite()
    triples = zip(is_finite.unbind(), values, moved, strict=True)
    values = [torch.where(good, value, average) for good, value, average in triples]
    torch._foreach_lerp_(moved, values, weight)
    for average, result in zip(averages, moved, strict=True):
        if result is not average:
            average.copy_(result, non_blocking=True)
    return [tuple(value.shape) for value in values], fetch(is_finite)


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
