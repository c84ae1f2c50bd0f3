"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffnext.utils.host_data import fetch


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
        self._open_checks: list[_Check] = []
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
        """The average; waits for what is still on its way from the device."""
        for check in self._open_checks:
            check.is_finite()
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

        Nothing waits for the device. A parameter whose value is not finite keeps its average, and
        :meth:`check` tells.

        Args:
            parameters: For every parameter of the model, in order: the parameter and its value.

        Raises:
            ValueError: If their number differs from the model's.
        """
        bucket = _Bucket(1 - self.decay, self._open_checks)
        for average, (parameter, value) in zip(self._model.parameters(), parameters, strict=True):
            if parameter.requires_grad:
                bucket.add(average, value.detach())
        bucket.flush()

    def check(self) -> None:
        """Look at the updates since the last check.

        Raises:
            ValueError: If a value was not finite.
        """
        checks, self._open_checks = self._open_checks, []
        shapes = [shape for check in checks for shape in check.find_nonfinite()]
        if shapes:
            raise ValueError(f"{len(shapes)} weights are not finite, one of {shapes[0]}")


class _Check(NamedTuple):
    """Which values were finite.

    Attributes:
        shapes: Of the values.
        is_finite: Tells for each; waits for the averages, too.
    """

    shapes: list[tuple[int, ...]]
    is_finite: Callable[[], Tensor]

    def find_nonfinite(self) -> list[tuple[int, ...]]:
        pairs = zip(self.shapes, self.is_finite().tolist(), strict=True)
        return [shape for shape, good in pairs if not good]


class _Bucket:
    """Averages some parameters at a time: few launches, little memory.

    Args:
        weight: Share of the new value in an average.
        checks: Gets one for all parameters averaged at a time.
    """

    MAX_ELEMENTS = 2**24

    def __init__(self, weight: float, checks: list[_Check]) -> None:
        self.weight = weight
        self.checks = checks
        self.averages: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_elements = 0

    def add(self, average: Tensor, value: Tensor) -> None:
        """Take a parameter; averages those taken before if there are many."""
        is_other_place = bool(self.values) and self.values[0].device != value.device
        if is_other_place or self.num_elements + value.numel() > self.MAX_ELEMENTS:
            self.flush()
        self.averages.append(average)
        self.values.append(value.float())
        self.num_elements += value.numel()

    def flush(self) -> None:
        """Average what was taken."""
        if not self.values:
            return
        # The arithmetic runs on the live device: with the average on the CPU, moving tensors there
        # and back is far cheaper than lerping them on the CPU.
        device = self.values[0].device
        moved = [a.to(device, torch.float32, non_blocking=True) for a in self.averages]
        is_finite = torch.stack(torch._foreach_norm(self.values, float("inf"))).isfinite()
        triples = zip(is_finite.unbind(), self.values, moved, strict=True)
        values = [torch.where(good, value, average) for good, value, average in triples]
        torch._foreach_lerp_(moved, values, self.weight)
        for average, result in zip(self.averages, moved, strict=True):
            if result is not average:
                average.copy_(result, non_blocking=True)
        self.checks.append(_Check([tuple(v.shape) for v in values], fetch(is_finite)))
        self.averages, self.values, self.num_elements = [], [], 0


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
