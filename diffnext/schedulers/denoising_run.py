"""Run any scheduler of the flow-matching or DDPM family from noise to data.

Shapes: ``sample`` is anything the schedulers take, here frames of latents (B, C, h, w).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

__all__ = ["DenoisingRun", "check_scheduler", "predicts_flow"]

Generators = torch.Generator | list[torch.Generator] | None

_STEP_ARGUMENTS = {"self", "model_output", "timestep", "sample"}
_FLOW_TYPES = ("flow", "flow_prediction")


def predicts_flow(scheduler: Any) -> bool:
    """Whether a scheduler takes the flow from data to noise, else the noise."""
    default = "flow" if "FlowMatch" in type(scheduler).__name__ else "epsilon"
    return scheduler.config.get("prediction_type", default) in _FLOW_TYPES


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler can denoise what NOVA predicts.

    Args:
        scheduler: Of diffusers or diffnext.

    Raises:
        ValueError: If it has another interface, or takes another prediction than the noise or
            the flow.
    """
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, method) for method in ("set_timesteps", "step", "config")):
        raise ValueError(f"{name} is no scheduler with set_timesteps and step")
    if "num_train_timesteps" not in scheduler.config:
        raise ValueError(f"{name} has no num_train_timesteps: it is not of the diffusion kind")
    required = {
        parameter.name
        for parameter in inspect.signature(type(scheduler).step).parameters.values()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    }
    if required != _STEP_ARGUMENTS:
        raise ValueError(
            f"{name}.step must need model_output, timestep and sample alone, "
            f"it needs {sorted(required - {'self'})}"
        )
    if hasattr(scheduler, "precondition_inputs"):
        raise ValueError(f"{name} preconditions its model, which NOVA was not trained for")
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in (None, "epsilon", *_FLOW_TYPES):
        raise ValueError(
            f"{name} has the prediction_type {prediction_type!r}, NOVA predicts 'epsilon' or the "
            "flow"
        )


class DenoisingRun:
    """One pass over a schedule; the scheduler it follows stays as it is.

    Args:
        scheduler: With its timesteps set.
        generator: Source of noise, for schedulers that draw some.
    """

    def __init__(self, scheduler: Any, generator: Generators = None) -> None:
        self.scheduler = copy.deepcopy(scheduler)  # it counts steps and keeps earlier outputs
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self.step_options = {"generator": generator} if takes_generator else {}

    def start(self, noise: Tensor) -> Tensor:
        """Unit noise at the scale the schedule begins with."""
        sigma = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return noise if sigma == 1.0 else noise * sigma

    def model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What the model is shown of a sample."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        return self.scheduler.scale_model_input(sample, timestep).to(sample.dtype)

    def step(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The sample one step nearer to data, in its own dtype."""
        output = self.scheduler.step(prediction, timestep, sample, **self.step_options)
        return output.prev_sample.to(sample.dtype)
