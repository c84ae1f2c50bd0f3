"""Flow matching with Euler steps (arXiv:2210.02747, arXiv:2403.03206).

Shapes: B batch, N tokens; samples are (B, ...).
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as euler
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffnext.utils.arguments import CHECKED, AtLeastOne, Positive, take_checked
from diffnext.utils.host_data import send

__all__ = ["FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteSchedulerOutput"]


FlowMatchEulerDiscreteSchedulerOutput = euler.FlowMatchEulerDiscreteSchedulerOutput
# Unknown to type checkers: its methods take some arguments at other places than those below.
_EulerScheduler: Any = euler.FlowMatchEulerDiscreteScheduler


@dataclass(config=CHECKED, frozen=True)
class NoiseLevels:
    """The numbers of a config that the noise levels are made of."""

    num_train_timesteps: AtLeastOne = 1000
    shift: Positive = 1.0


# diffusers finds a class's loader by the name SchedulerMixin in the module of the class.
class FlowMatchEulerDiscreteScheduler(_EulerScheduler):
    """diffusers' flow-matching scheduler with a training side of its own.

    The training tables run from sigma 1 down, and sampling does not change them.

    It takes the arguments of diffusers' class; the first three are ``num_train_timesteps`` (K),
    ``shift`` (s: sigma becomes s sigma / (1 + (s - 1) sigma)) and ``use_dynamic_shifting``.

    Attributes:
        timestep: Timesteps of the last :meth:`add_noise`, float32; None before.
        sigma: Noise levels of the last :meth:`add_noise`; None before.
    """

    timestep: Tensor | None = None
    sigma: Tensor | None = None

    def register_to_config(self, **kwargs: Any) -> None:
        """Keep the arguments as the config.

        Raises:
            ValueError: If one that noise levels are made of is not a number in range.
        """
        take_checked(NoiseLevels, dict(kwargs))
        super().register_to_config(**kwargs)

    def set_timesteps(
        self, num_inference_steps: int | None = None, mu: float | None = None, **kwargs: Any
    ) -> None:
        """Make the sampling schedule.

        Args:
            num_inference_steps: Number of steps.
            mu: Shift instead of ``shift``, with ``use_dynamic_shifting``.
            **kwargs: ``device``, ``sigmas`` and ``timesteps`` of diffusers' method.

        Raises:
            TypeError: If ``mu`` is not a number.
        """
        if not isinstance(mu, Real | None):
            raise TypeError(f"mu, the second argument of set_timesteps, is a number, got {mu!r}")
        super().set_timesteps(num_inference_steps, mu=mu, **kwargs)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One Euler step: x + (sigma' - sigma) v.

        Args:
            model_output: Predicted flow v, shaped like ``sample``.
            timestep: One of ``timesteps``; finds the step when none was taken yet.
            sample: x, (B, ...).
            generator: Source of noise, with ``stochastic_sampling``.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``prev_sample``, shaped like ``sample`` and in its dtype.
        """
        output = super().step(model_output, timestep, sample, generator=generator)
        output.prev_sample = output.prev_sample.to(sample.dtype)
        return output if return_dict else output.to_tuple()

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
        return (normal.sigmoid() * self.config["num_train_timesteps"]).to(torch.int64)

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
        index = send(index, sample.device)
        num = self.config["num_train_timesteps"]
        shift = 1.0 if self.config["use_dynamic_shifting"] else self.config["shift"]
        levels = torch.arange(num, 0, -1, dtype=torch.float32, device=sample.device) / num
        table = shift * levels / (1 + (shift - 1) * levels)  # (K,), descending from 1
        sigma = table[index]
        return sigma.reshape(*index.shape, *[1] * (sample.ndim - index.ndim)), sigma * num

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
