"""Learning rates as functions of the step.

The trainer asks for a rate and sets it itself, so resuming only needs the step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class LRScheduler:
    """Linear warm-up followed by a decay that subclasses define.

    Args:
        lr_max: Rate after the warm-up.
        lr_min: Rate that the decay approaches.
        warmup_steps: Steps of the warm-up; 0 for none.
        warmup_factor: Fraction of ``lr_max`` from which the warm-up starts.
        max_steps: No effect here; configurations give it to every schedule.
    """

    lr_max: float
    lr_min: float = 0.0
    warmup_steps: int = 0
    warmup_factor: float = 0.001
    max_steps: int | None = None
    _step_count = 0

    def step(self) -> None:
        """Go to the next step."""
        self._step_count += 1

    def get_lr(self) -> float:
        """Rate of the current step."""
        return self.lr_at(self._step_count)

    def lr_at(self, step: int) -> float:
        """Rate of any step, counted from 0."""
        if step < self.warmup_steps:
            alpha = (step + 1) / self.warmup_steps
            return self.lr_max * (alpha + (1 - alpha) * self.warmup_factor)
        return self.lr_min + (self.lr_max - self.lr_min) * self.decay_at(step)

    def decay_at(self, step: int) -> float:
        """Remaining share of ``lr_max - lr_min`` at a step after the warm-up."""
        raise NotImplementedError


class ConstantLR(LRScheduler):
    """``lr_max`` at every step after the warm-up; ``lr_min`` and ``max_steps`` have no effect."""

    def decay_at(self, step: int) -> float:
        """No decay."""
        return 1.0


class CosineLR(LRScheduler):
    """Half a cosine from ``lr_max`` down to ``lr_min``.

    Args:
        lr_max: Rate after the warm-up.
        max_steps: Step at which ``lr_min`` is reached, warm-up included.
        lr_min: The lowest rate.
        decay_step: The rate changes every ``decay_step`` steps.
        warmup_steps: Steps of the warm-up.
        warmup_factor: Fraction of ``lr_max`` from which the warm-up starts.

    Raises:
        ValueError: If no steps remain after the warm-up.

    Source: SGDR, arXiv:1608.03983, equation 5, without restarts.
    """

    def __init__(
        self,
        lr_max: float,
        max_steps: int,
        lr_min: float = 0.0,
        decay_step: int = 1,
        warmup_steps: int = 0,
        warmup_factor: float = 0.001,
    ) -> None:
        super().__init__(lr_max, lr_min, warmup_steps, warmup_factor)
        if max_steps <= warmup_steps:
            raise ValueError(
                f"max_steps must be larger than warmup_steps, got {max_steps} and {warmup_steps}"
            )
        self.decay_length = max_steps - warmup_steps
        self.decay_step = decay_step

    def decay_at(self, step: int) -> float:
        """Cosine of the progress, held for ``decay_step`` steps."""
        elapsed = (step - self.warmup_steps) // self.decay_step * self.decay_step
        return 0.5 * (1 + math.cos(math.pi * elapsed / self.decay_length))


class MultiStepLR(LRScheduler):
    """Multiply the rate by ``decay_gamma`` at given steps.

    Args:
        lr_max: Rate after the warm-up.
        decay_steps: Steps at which the rate drops.
        decay_gamma: Factor of each drop.
        lr_min: Rate that the drops approach.
        warmup_steps: Steps of the warm-up.
        warmup_factor: Fraction of ``lr_max`` from which the warm-up starts.
        max_steps: No effect; configurations give it to every schedule.
    """

    def __init__(
        self,
        lr_max: float,
        decay_steps: Sequence[int],
        decay_gamma: float,
        lr_min: float = 0.0,
        warmup_steps: int = 0,
        warmup_factor: float = 0.001,
        max_steps: int | None = None,
    ) -> None:
        super().__init__(lr_max, lr_min, warmup_steps, warmup_factor)
        self.decay_steps = sorted(decay_steps)
        self.decay_gamma = decay_gamma

    def decay_at(self, step: int) -> float:
        """``decay_gamma`` to the power of the drops so far."""
        return self.decay_gamma ** bisect.bisect_right(self.decay_steps, step)
