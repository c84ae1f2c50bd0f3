"""Flow matching with Euler steps (arXiv:2210.02747, arXiv:2403.03206).

Shapes: B batch, N tokens; samples are (B, ...).
"""

from __future__ import annotations

from functools import lru_cache

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

__all__ = ["FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteSchedulerOutput"]


@lru_cache(maxsize=8)
def _training_sigmas(num_train_timesteps: int, shift: float) -> Tensor:
    levels = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
    return shift * levels / (1 + (shift - 1) * levels)


# diffusers finds a class's loader by the base class in the namespace of its module.
class FlowMatchEulerDiscreteScheduler(diffusers.FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """diffusers' flow-matching scheduler with a training side of its own.

    The training tables run from sigma 1 down and stay as they are whatever is sampled meanwhile.

    The arguments are those of diffusers' class; the first three are ``num_train_timesteps`` (K),
    ``shift`` (s: sigma becomes s sigma / (1 + (s - 1) sigma)) and ``use_dynamic_shifting``.

    Attributes:
        timestep: Timesteps of the last :meth:`add_noise`, float32; None before.
        sigma: Noise levels of the last :meth:`add_noise`; None before.
    """

    timestep: Tensor | None = None
    sigma: Tensor | None = None

    @property
    def _train_sigmas(self) -> Tensor:
        """Noise levels of the training indices, (K,), descending from 1, float32 on the CPU."""
        shift = 1.0 if self.config.use_dynamic_shifting else self.config.shift
        return _training_sigmas(self.config.num_train_timesteps, shift)

    def sample_timesteps(
        self, size: int | tuple[int, ...], device: torch.device | str | None = None
    ) -> Tensor:
        """Draw training indices, logit-normal over the descending tables.

        Args:
            size: Shape of the result.
            device: Where to draw.

        Returns:
            int64 indices into the training tables.

        Source: arXiv:2403.03206, section 3.1.
        """
        size = (size,) if isinstance(size, int) else tuple(size)
        normal = torch.normal(0.0, 1.0, size, device=device)
        return (normal.sigmoid() * self.config.num_train_timesteps).to(torch.int64)

    def corrupt(
        self, original_samples: Tensor, noise: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move data toward noise: x_t = (1 - sigma) x + sigma noise.

        Args:
            original_samples: Clean data, (B, ...).
            noise: Same shape.
            index: Training indices over any leading dimensions, such as (B,) or (B, N).

        Returns:
            Noisy data in the dtype of the clean, and the float32 timestep of each index.
        """
        sigma, timestep = self._training_levels(index, original_samples)
        x_t = sigma * noise.float() + (1.0 - sigma) * original_samples.float()
        return x_t.to(original_samples.dtype), timestep

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy data of :meth:`corrupt`; its levels are kept in ``timestep`` and ``sigma``."""
        self.sigma, self.timestep = self._training_levels(timesteps, original_samples)
        return self.corrupt(original_samples, noise, timesteps)[0]

    def _training_levels(self, index: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Sigma broadcastable to ``sample``, and timesteps shaped like ``index``, float32."""
        index = index.to(sample.device)
        sigma = self._train_sigmas.to(sample.device)[index]
        timestep = sigma * self.config.num_train_timesteps
        return sigma.reshape(*index.shape, *[1] * (sample.ndim - index.ndim)), timestep

    def scale_noise(
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Noise a sample to the current step of the sampling schedule.

        Args:
            sample: Clean data.
            timestep: One of ``timesteps``; finds the step when none was taken yet.
            noise: Same shape as ``sample``.

        Returns:
            Noisy data, same shape and dtype.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma = self.sigmas[self.step_index].to(device=sample.device, dtype=sample.dtype)
        return sigma * noise + (1.0 - sigma) * sample
