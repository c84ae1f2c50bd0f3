"""What a training step gives the device to do: forward, backward, optimizer; nothing waits for it.

The device itself leaves out a step with NaN or infinity, so that no weight ever takes it. The host
learns of it while the device is at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffnext.config.schema import TrainConfig
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.utils.host_data import fetch

__all__ = ["Outcome", "Stepper", "detach_metrics", "mean_by_name"]

UNKNOWN = "a parameter"


@dataclass(frozen=True)
class Outcome:
    """What became of an optimizer step; the same on every process, as the gradients are.

    Attributes:
        norm: Norm of all gradients before clipping, a scalar on the device.
        is_applied: Tells whether the optimizer stepped; waits for this step, not for later ones.
        find_culprit: Names the first parameter whose gradient is NaN or infinite.
    """

    norm: Tensor
    is_applied: Callable[[], bool]
    find_culprit: Callable[[], str] = lambda: UNKNOWN


class Stepper:
    """Runs micro-batches and steps the optimizer.

    Args:
        config: Training configuration.
        accelerator: The engine.
        pipeline: Training pipeline, which prepares batches.
        model: Prepared model.
        optimizer: Prepared optimizer.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        pipeline: Any,
        model: Any,
        optimizer: Any,
    ) -> None:
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.model = model
        self.optimizer = optimizer
        self.weights = config.model.loss_weights.by_output()
        self.max_norm = config.training.max_grad_norm
        self.uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def bare_model(self) -> NOVATransformer3DModel:
        """The model without the wrappers of distributed training."""
        return cast(NOVATransformer3DModel, self.accelerator.unwrap_model(self.model))

    def run_micro_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Forward and backward; returns the losses and metrics, detached."""
        with self.accelerator.autocast():
            inputs = self.pipeline.preprocess(batch)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():  # which accelerate adds to all engines but FSDP2
                outputs = self.model(inputs)
            # Under DeepSpeed this also steps the optimizer after the last micro-batch.
            self.accelerator.backward(total_loss(outputs, self.weights))
        return detach_metrics(outputs, self.accelerator.device)

    def step_optimizer(self) -> Outcome:
        """Clip the gradients and step, unless one of them is NaN or infinite."""
        outcome = self._outcome_of_deepspeed() if self.uses_deepspeed else self._clip_and_step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _outcome_of_deepspeed(self) -> Outcome:
        """DeepSpeed has stepped already, or dropped the gradients if they overflowed."""
        norm = torch.as_tensor(self.model.get_global_grad_norm(), device=self.model.device)
        is_applied = not self.optimizer.step_was_skipped
        return Outcome(norm.detach().float(), lambda: is_applied)

    def _clip_and_step(self) -> Outcome:
        self.accelerator.unscale_gradients(self.optimizer)
        named = dict(self.bare_model.named_parameters())
        gradients = {name: one.grad for name, one in named.items() if one.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        if isinstance(norms, DTensor):
            norms = norms.full_tensor()
        norm = torch.linalg.vector_norm(norms)
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(named.values(), self.max_norm, norm)
        is_finite = norm.isfinite()
        self._step_if(is_finite)
        fetched = fetch(is_finite)

        def find_culprit() -> str:
            are_finite = norms.isfinite().tolist()
            return next((n for n, ok in zip(gradients, are_finite, strict=True) if not ok), UNKNOWN)

        return Outcome(norm.detach().float(), lambda: bool(fetched()), find_culprit)

    def _step_if(self, is_finite: Tensor) -> None:
        optimizer = self.optimizer.optimizer  # without accelerate's wrapper
        if self.accelerator.scaler is not None:  # which looks by itself, and must see overflows
            self.optimizer.step()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # the fused ones
            optimizer.found_inf = (~is_finite).float()
            self.optimizer.step()
        elif is_finite.item():  # the host decides, which waits for the device
            self.optimizer.step()


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


def mean_by_name(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each value, over the batches that have it: single frames have other losses."""
    names = sorted({name for values in found for name in values})
    columns = {name: [values[name] for values in found if name in values] for name in names}
    return {name: torch.stack(column).mean() for name, column in columns.items()}
