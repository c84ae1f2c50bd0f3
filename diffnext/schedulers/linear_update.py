"""Schedulers whose steps are weighted sums of sample, prediction and fresh noise.

Such a step works on each element separately, so tokens need not be put back into frames, and its
weights are numbers, so nothing is looked up while denoising.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import diffusers

from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler

__all__ = ["LinearUpdate", "linear_updates"]


@dataclass(frozen=True)
class LinearUpdate:
    """A step: sample * sample_weight + prediction * prediction_weight + noise * noise_weight."""

    sample_weight: float
    prediction_weight: float
    noise_weight: float = 0.0


def linear_updates(scheduler: Any) -> list[LinearUpdate] | None:
    """The steps of a scheduler whose timesteps are set, if they are known to be linear.

    Known are Euler steps of flow matching (arXiv:2210.02747) and ancestral steps of DDPM for
    predicted noise (arXiv:2006.11239), of diffusers and of diffnext.

    Returns:
        A step for each timestep, or None.
    """
    config = scheduler.config
    if type(scheduler) in (
        diffusers.FlowMatchEulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    ):
        return None if config.stochastic_sampling else _euler_updates(scheduler)
    clips = config.get("clip_sample") or config.get("thresholding")
    is_ours = type(scheduler) is DDPMScheduler  # never clips
    if is_ours or (type(scheduler) is diffusers.DDPMScheduler and not clips):
        is_plain = config.variance_type in ("fixed_small", "fixed_large")
        return (
            _ddpm_updates(scheduler) if is_plain and config.prediction_type == "epsilon" else None
        )
    return None


def _euler_updates(scheduler: Any) -> list[LinearUpdate]:
    sigmas = scheduler.sigmas.tolist()
    return [LinearUpdate(1.0, after - now) for now, after in zip(sigmas, sigmas[1:], strict=False)]


def _ddpm_updates(scheduler: Any) -> list[LinearUpdate]:
    """Equations 7 and 11 of the paper, without the detour over the predicted clean sample."""
    updates = []
    for timestep in scheduler.timesteps.tolist():
        previous = int(scheduler.previous_timestep(timestep))
        abar = float(scheduler.alphas_cumprod[timestep])
        if abar == 0:
            raise ValueError(
                "timestep_spacing 'leading' is needed with rescale_betas_zero_snr: at the last "
                "timestep the noise hides everything, and nothing can be predicted from it"
            )
        abar_previous = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else 1.0
        alpha = abar / abar_previous
        sample_weight = 1 / math.sqrt(alpha)
        prediction_weight = -(1 - alpha) * sample_weight / math.sqrt(1 - abar)
        variance = float(scheduler._get_variance(timestep))
        noise_weight = math.sqrt(variance) if timestep > 0 else 0.0
        updates.append(LinearUpdate(sample_weight, prediction_weight, noise_weight))
    return updates
