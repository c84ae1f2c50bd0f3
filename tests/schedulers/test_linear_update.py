"""Steps as weighted sums equal the schedulers' own steps."""

import diffusers
import pytest
import torch

from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.pipelines.nova import sampling
from diffnext.pipelines.nova.sampling import GenerationRun, denoise, embed_steps
from diffnext.schedulers.denoising_run import DenoisingRun
from diffnext.schedulers.linear_update import linear_updates
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.tiny import generation_inputs, make_model

LINEAR = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    DDPMScheduler(),
    DDPMScheduler(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2"),
    DDPMScheduler(variance_type="fixed_large", timestep_spacing="linspace"),
    diffusers.DDPMScheduler(clip_sample=False),
    diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="linspace"),
]
OTHERS = [
    diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    diffusers.DDPMScheduler(),  # clips
    diffusers.DDPMScheduler(clip_sample=False, thresholding=True),
    DDPMScheduler(prediction_type="sample"),
    DDPMScheduler(variance_type="learned_range"),
    diffusers.DDIMScheduler(),
    diffusers.FlowMatchHeunDiscreteScheduler(),
    diffusers.UniPCMultistepScheduler(),
]


def name_of(scheduler):
    return f"{type(scheduler).__module__.split('.')[0]}-{type(scheduler).__name__}"


@pytest.mark.parametrize("scheduler", LINEAR, ids=name_of)
@pytest.mark.parametrize("num_steps", [3, 25])
def test_a_linear_step_is_the_schedulers_step(scheduler, num_steps):
    scheduler.set_timesteps(num_steps)
    updates = linear_updates(scheduler)
    assert len(updates) == num_steps
    for timestep, update in zip(scheduler.timesteps, updates, strict=True):
        sample, prediction = torch.randn(2, 1, 4, 6, 6).unbind(0)
        generator = torch.Generator().manual_seed(0)
        expected = scheduler.step(prediction, timestep, sample, generator=generator).prev_sample
        noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
        result = sample * update.sample_weight + prediction * update.prediction_weight
        result = result + noise * update.noise_weight
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", OTHERS, ids=name_of)
def test_other_schedulers_are_not_taken_for_linear(scheduler):
    scheduler.set_timesteps(5)
    assert linear_updates(scheduler) is None


@pytest.mark.parametrize("scheduler", LINEAR, ids=name_of)
@pytest.mark.parametrize("options", [{}, {"guidance_trunc": 500}, {"image_guidance_scale": 1.5}])
def test_denoising_tokens_equals_denoising_frames(scheduler, options):
    """The same random draws, the same latents, whether or not tokens are put into frames."""
    model = make_model()
    model.sample_scheduler = scheduler
    tokens = model(generation_inputs(num_diffusion_steps=6, **options))["x"]
    unknown = type("Unknown", (type(scheduler),), {})  # not known to be linear
    model.sample_scheduler = unknown.from_config(scheduler.config)
    frames = model(generation_inputs(num_diffusion_steps=6, **options))["x"]
    scale = frames.abs().max()  # untrained models may end far out
    torch.testing.assert_close(tokens / scale, frames / scale, atol=1e-4, rtol=0)


def test_modulations_of_few_steps_at_a_time_change_nothing(monkeypatch):
    model = make_model()
    at_once = model(generation_inputs(guidance_trunc=500, num_diffusion_steps=6))["x"]
    monkeypatch.setattr(sampling, "MAX_MODULATION_BYTES", {"cpu": 1})
    one_by_one = model(generation_inputs(guidance_trunc=500, num_diffusion_steps=6))["x"]
    torch.testing.assert_close(at_once, one_by_one, atol=1e-5, rtol=1e-5)


def test_renormalised_guidance_sees_the_whole_frame():
    model = make_model()
    z = torch.randn(2, 2, 64)
    run = GenerationRun(DenoisingRun(FlowMatchEulerDiscreteScheduler(), 3))
    steps = embed_steps(model, run.scheduler, z)
    ids = torch.tensor([[[0], [7]]])
    noise = torch.randn(1, 4, 8, 12)
    other = noise.clone()
    other[:, :, 6:, 10:] += 1  # a token that is not predicted
    for renorm, is_equal in ((1.0, True), (0.1, False)):
        guidance = GuidanceScaler(guidance_scale=5, guidance_renorm=renorm)
        with torch.no_grad():
            first, second = (
                denoise(model, guidance, run, steps, z, x, ids) for x in (noise, other)
            )
        assert torch.equal(first, second) == is_equal
