"""One drawing's own copy of a scheduler, of the flow-matching or the DDPM family.

Shapes: ``sample`` is anything the schedulers take, here frames of latents (B, C, h, w).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from diffnext.schedulers.linear_update import LinearUpdate, linear_updates
from diffnext.schedulers.scheduling_cfm import NoiseLevels
from diffnext.utils.arguments import take_checked
from diffnext.utils.messages import naming

__all__ = ["DenoisingRun", "check_scheduler", "predicts_flow"]

Generators = torch.Generator | list[torch.Generator] | None

_STEP_ARGUMENTS = {"self", "model_output", "timestep", "sample"}
_FLOW_TYPES = ("flow", "flow_prediction")


def predicts_flow(scheduler: Any) -> bool:
    """Whether a scheduler takes the flow from data to noise, else the noise."""
    default = "flow" if "FlowMatch" in type(scheduler).__name__ else "epsilon"
    return scheduler.config.get("prediction_type", default) in _FLOW_TYPES


def check_scheduler(scheduler: Any, flow_shift: float | None = None) -> None:
    """Check that a scheduler can denoise what NOVA predicts.

    Args:
        scheduler: A scheduler of diffusers or diffnext.
        flow_shift: Timestep shift that it will get, if any.

    Raises:
        ValueError: If it has another interface, takes another prediction than the noise or the
            flow, has a variance that NOVA cannot use, has a shift out of range, or cannot be
            shifted.
    """
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, method) for method in ("set_timesteps", "step", "config")):
        raise ValueError(f"scheduler must have set_timesteps and step, got {name}")
    if "num_train_timesteps" not in scheduler.config:
        raise ValueError(f"{name} has no num_train_timesteps: it is not a diffusion scheduler")
    with naming(name):
        take_checked(NoiseLevels, dict(scheduler.config))
    required = {
        parameter.name
        for parameter in inspect.signature(type(scheduler).step).parameters.values()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    }
    if required != _STEP_ARGUMENTS:
        raise ValueError(
            f"{name}.step must need only model_output, timestep and sample, "
            f"it needs {sorted(required - {'self'})}"
        )
    if hasattr(scheduler, "precondition_inputs"):
        raise ValueError(f"{name} preconditions its model, which NOVA was not trained for")
    if scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(f"{name} has use_dynamic_shifting, for which NOVA has no shift to give")
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in (None, "epsilon", *_FLOW_TYPES):
        raise ValueError(
            f"{name} has the prediction_type {prediction_type!r}, NOVA predicts 'epsilon' or the "
            "flow"
        )
    variance_type = scheduler.config.get("variance_type")
    if variance_type in ("fixed_large_log", "learned", "learned_range"):
        raise ValueError(
            f"{name} has the variance_type {variance_type!r}, with which NOVA cannot denoise"
        )
    if flow_shift is not None and not hasattr(scheduler, "set_shift"):
        raise ValueError(
            f"flow_shift={flow_shift} needs a flow-matching scheduler, but the pipeline has "
            f"{name}, which cannot be shifted"
        )


class DenoisingRun:
    """A copy of a scheduler with its timesteps set; the scheduler itself stays as it is.

    Args:
        scheduler: A scheduler of diffusers or diffnext.
        num_steps: Denoising steps.
        flow_shift: Timestep shift instead of the scheduler's own.

    Attributes:
        timesteps: As the scheduler lists them.
        updates: Its steps as weighted sums, if they are known to be.

    Raises:
        ValueError: If the scheduler does not fit, or cannot make so many steps.
    """

    def __init__(self, scheduler: Any, num_steps: int, flow_shift: float | None = None) -> None:
        check_scheduler(scheduler, flow_shift)
        self._scheduler = copy.deepcopy(scheduler)
        self._num_steps = num_steps
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        if flow_shift is not None:
            self._scheduler.set_shift(flow_shift)
        with naming("num_diffusion_steps"):
            self.restart()
        self.timesteps = list(self._scheduler.timesteps)
        self.updates: list[LinearUpdate] | None = linear_updates(self._scheduler)

    def restart(self) -> None:
        """Forget what earlier sets of tokens left: steps taken and outputs kept."""
        self._scheduler.set_timesteps(self._num_steps)

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Unit noise at the scale the schedule begins with."""
        sigma = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        return noise if sigma == 1.0 else noise * sigma

    def model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What the model is shown of a sample."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return sample
        return self._scheduler.scale_model_input(sample, timestep).to(sample.dtype)

    def step(
        self, prediction: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
    ) -> Tensor:
        """The sample one step nearer to data, in its own dtype."""
        options = {"generator": generator} if self._takes_generator else {}
        output = self._scheduler.step(prediction, timestep, sample, **options)
        return output.prev_sample.to(sample.dtype)
