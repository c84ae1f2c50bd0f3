"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

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
        self.model = _copy_module(model).eval()
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
        for average, (parameter, value) in zip(self.model.parameters(), parameters, strict=True):
            if not parameter.requires_grad:
                continue
            if not value.isfinite().all():
                not_finite.append(tuple(value.shape))
                continue
            # The arithmetic runs on the live device: with the average on the CPU, moving one tensor
            # there and back is far cheaper than lerping it on the CPU.
            moved = average.to(value.device, torch.float32)
            average.copy_(self.decay * moved + (1 - self.decay) * value.detach().float())
        if not_finite:
            raise ValueError(f"{len(not_finite)} weights are not finite, one of {not_finite[0]}")


def _copy_module(model: nn.Module) -> nn.Module:
    """Copy parameters, buffers and submodules; share everything else.

    Pipelines hang the text encoder and themselves on the model as plain attributes: copying those
    would double the memory of a run.
    """
    own = vars(nn.Module()).keys()
    shared = {
        id(value): value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in own
    }
    return copy.deepcopy(model, shared)
