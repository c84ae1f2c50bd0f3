"""Schedulers of diffusers through one interface."""

import math

import diffusers
import pytest
import torch

from diffnext.schedulers.denoising_run import DenoisingRun, check_scheduler, predicts_flow
from tests.tiny import generation_inputs, make_model

FITTING = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]


@pytest.mark.parametrize(("name", "config"), FITTING, ids=lambda value: str(value))
def test_a_run_repeats_itself(name, config):
    """Nothing of one set of tokens may reach the next through the scheduler."""
    scheduler = getattr(diffusers, name)(**config)
    run = DenoisingRun(scheduler, 4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def denoise():
        generator = torch.Generator().manual_seed(1)
        run.restart()
        x = run.scale_noise(noise)
        for timestep in run.timesteps:
            x = run.step(run.model_input(x, timestep) * 0.5, timestep, x, generator)
        return x

    first = denoise()
    assert first.dtype == torch.float32 and torch.isfinite(first).all()
    assert torch.equal(first, denoise())


@pytest.mark.parametrize("name", [name for name, _ in FITTING[:7]])
def test_models_generate_with_it(name):
    model = make_model()
    model.sample_scheduler = getattr(diffusers, name)()
    latents = model(generation_inputs())["x"]
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, model(generation_inputs())["x"])


def test_an_exact_model_leads_every_flow_scheduler_to_the_data():
    """With the true flow, noise - data, all solvers must arrive at the data."""
    data = torch.randn(1, 4, 8, 8)
    noise = torch.randn(1, 4, 8, 8)
    for name, config in FITTING[:5]:
        run = DenoisingRun(getattr(diffusers, name)(**config), 10)
        x = run.scale_noise(noise)
        for timestep in run.timesteps:
            if name == "FlowMatchLCMScheduler":  # draws new noise at every step
                sigma = float(timestep) / 1000
                x = run.step((x - data) / sigma, timestep, x)
            else:
                x = run.step(noise - data, timestep, x)
        torch.testing.assert_close(x, data, atol=1e-2, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (None, "must have set_timesteps and step, got NoneType"),
        (diffusers.ScoreSdeVeScheduler(), "must have set_timesteps and step"),
        (diffusers.RePaintScheduler(), r"it needs \['mask', .*'original_image'"),
        (diffusers.EDMEulerScheduler(), "preconditions its model"),
        (diffusers.DDPMScheduler(prediction_type="v_prediction"), "prediction_type 'v_prediction'"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "variance_type 'learned_range'"),
        (diffusers.DDPMScheduler(variance_type="fixed_large_log"), "variance_type 'fixed_large_l"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=0.0), "shift must be greater than 0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=-1), "Scheduler: shift must be greater"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=math.nan), "shift must be a finite"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler)


def test_the_family_of_a_scheduler():
    assert predicts_flow(diffusers.FlowMatchEulerDiscreteScheduler())
    assert not predicts_flow(diffusers.DDIMScheduler())
    flow = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    assert predicts_flow(flow)
