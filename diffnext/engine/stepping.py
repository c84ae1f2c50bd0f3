"""What a training step gives the device to do: forward, backward, optimizer; nothing waits for it.

The device itself leaves out a step that is not finite, so that no weight ever takes it. The host
learns of it while the device is at the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffnext.config.schema import TrainConfig
from diffnext.engine.step_values import (
    UNKNOWN,
    detach_metrics,
    find_nonfinite_gradient,
    total_loss,
)
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.utils.host_data import fetch

__all__ = ["Outcome", "Stepper"]


@dataclass(frozen=True)
class Outcome:
    """What became of an optimizer step; the same on every process, as the gradients are.

    Attributes:
        norm: Norm of all gradients before clipping, a scalar on the device.
        is_applied: Tells whether the optimizer stepped; waits for the step, but for no later one.
        find_culprit: Names the first parameter whose gradient is NaN or infinite.
    """

    norm: Tensor
    is_applied: Callable[[], bool]
    find_culprit: Callable[[], str]


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
        """Clip the gradients and step, unless one of them is not finite."""
        outcome = self._outcome_of_deepspeed() if self.uses_deepspeed else self._clip_and_step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _outcome_of_deepspeed(self) -> Outcome:
        """DeepSpeed has stepped already, unless the gradients overflowed, and dropped them."""
        norm = torch.as_tensor(self.model.get_global_grad_norm(), device=self.model.device)
        is_applied = not self.optimizer.step_was_skipped
        return Outcome(norm.detach().float(), lambda: is_applied, lambda: UNKNOWN)

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
        told = fetch(is_finite)
        return Outcome(
            norm.detach().float(),
            lambda: bool(told()),
            lambda: find_nonfinite_gradient(list(gradients), norms),
        )

    def _step_if(self, is_finite: Tensor) -> None:
        optimizer = self.optimizer.optimizer  # without accelerate's wrapper
        if self.accelerator.scaler is not None:  # which looks by itself, and must see overflows
            self.optimizer.step()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # those that are fused
            optimizer.found_inf = (~is_finite).float()
            self.optimizer.step()
        elif is_finite.item():  # others have to be told by the host
            self.optimizer.step()
