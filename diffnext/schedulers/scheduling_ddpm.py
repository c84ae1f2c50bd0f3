"""Denoising diffusion probabilistic models (arXiv:2006.11239).

Shapes: B batch, N tokens; samples are (B, ...), channels second.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddpm import (
    DDPMSchedulerOutput,
    betas_for_alpha_bar,
    rescale_zero_terminal_snr,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from diffnext.utils.host_data import send

__all__ = [
    "DDPMScheduler",
    "DDPMSchedulerOutput",
    "betas_for_alpha_bar",
    "rescale_zero_terminal_snr",
]


# diffusers finds a class's loader by the name SchedulerMixin in the module of the class.
class DDPMScheduler(scheduling_ddpm.DDPMScheduler):
    """diffusers' DDPM scheduler without clipping, as NOVA was trained and sampled with.

    ``clip_sample`` and ``thresholding`` are accepted and do nothing, and the step before t is
    t - K // n for any spacing.

    It takes the arguments of diffusers' class.
    """

    def previous_timestep(self, timestep: int) -> int | Tensor:
        """The timestep after ``timestep`` in sampling order; -1 or below past the end."""
        if self.custom_timesteps:
            return super().previous_timestep(timestep)
        num_train_timesteps = self.config["num_train_timesteps"]
        return timestep - num_train_timesteps // (self.num_inference_steps or num_train_timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor]:
        """One reverse step, equations 7 and 11 of the paper.

        Args:
            model_output: Prediction of ``config.prediction_type``, shaped like ``sample``; twice
                the channels when the variance is learned.
            timestep: Where ``sample`` is.
            sample: (B, C, ...).
            generator: Source of the noise added at every timestep above 0.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``prev_sample``, shaped like ``sample``.
        """
        if self.variance_type == "fixed_large_log":
            raise ValueError(
                "variance_type 'fixed_large_log' has no real standard deviation: use 'fixed_large'"
            )
        plain: Any = copy.copy(self)
        plain._internal_dict = FrozenDict(
            {**self.config, "thresholding": False, "clip_sample": False}
        )
        parent: Any = scheduling_ddpm.DDPMScheduler
        stepped = parent.step(plain, model_output, timestep, sample, generator)
        return stepped if return_dict else (stepped.prev_sample,)

    def sample_timesteps(
        self, size: int | tuple[int, ...], device: torch.device | str | None = None
    ) -> Tensor:
        """Draw training timesteps, uniform int64 of the given shape."""
        size = (size,) if isinstance(size, int) else tuple(size)
        return torch.randint(0, self.config["num_train_timesteps"], size, device=device)

    def corrupt(
        self, original_samples: Tensor, noise: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noisy data at each timestep of ``index``, and ``index`` itself (as the timestep)."""
        return self.add_noise(original_samples, noise, index), index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Move data toward noise: x_t = sqrt(abar) x + sqrt(1 - abar) noise.

        Args:
            original_samples: Clean data, (B, ...).
            noise: Same shape.
            timesteps: Over any leading dimensions, such as (B,) or (B, N).

        Returns:
            Noisy data, same shape and dtype.
        """
        signal, spread = self._training_levels(timesteps, original_samples)
        return signal * original_samples + spread * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity, sqrt(abar) noise - sqrt(1 - abar) x (arXiv:2202.00512)."""
        signal, spread = self._training_levels(timesteps, sample)
        return signal * noise - spread * sample

    def _training_levels(self, timesteps: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), broadcastable to ``sample`` and in its dtype."""
        timesteps = send(timesteps, sample.device)
        abar = send(self.alphas_cumprod.to(sample.dtype), sample.device)[timesteps]
        abar = abar.reshape(*timesteps.shape, *[1] * (sample.ndim - timesteps.ndim))
        return abar**0.5, (1 - abar) ** 0.5
