"""The model against NOVA as the specification words it."""

import pytest
import torch

from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests import reference_nova
from tests.tiny import generation_inputs, make_model, make_prompts

MODELS = {
    "tables": {},
    "rotary": {"rotary_pos_embed": True},
    "mixer": {"video_mixer_rank": 8},
}
SCHEDULERS = {"flow": FlowMatchEulerDiscreteScheduler, "ddpm": DDPMScheduler}
OPTIONS = {
    "guided": {},
    "plain": {"guidance_scale": 1.0},
    "truncated": {"guidance_trunc": 600, "num_diffusion_steps": 8},
    "renormalised": {"guidance_renorm": 0.5},
    "growing": {"min_guidance_scale": 0.5},
    "single": {"num_preds": [1] * 24},
    "per-sample": {"generator": "list"},
    "interval": {"guidance_interval": (300, 800), "num_diffusion_steps": 8},
}
IMAGE = {"image_guidance_scale": 1.5}
THREE_PASSES = {
    "image": IMAGE,
    "image, renormalised": {**IMAGE, "guidance_renorm": 0.5},
    "image, growing": {**IMAGE, "min_guidance_scale": 0.5},
    "image, truncated": {**IMAGE, "guidance_trunc": 600, "num_diffusion_steps": 8},
    "image, interval": {**IMAGE, "guidance_interval": (300, 800), "num_diffusion_steps": 8},
    "image, per-sample": {**IMAGE, "generator": "list"},
    "spatiotemporal": {"spatiotemporal_guidance_scale": 0.7},
    "spatiotemporal, all": {
        "spatiotemporal_guidance_scale": 0.7,
        "guidance_renorm": 0.5,
        "min_guidance_scale": 0.5,
        "guidance_interval": (300, 800),
        "num_diffusion_steps": 8,
    },
}


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def relative_difference(model, make_inputs):
    found = model(make_inputs())["x"]
    return relative_error(found, reference_nova.generate(model, make_inputs()))


@pytest.mark.parametrize(
    "options", {**OPTIONS, **THREE_PASSES}.values(), ids=[*OPTIONS, *THREE_PASSES]
)
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_latents_are_those_of_the_plain_loop(model, scheduler, options):
    model = make_model(frames=3, **model)
    model.sample_scheduler = scheduler()

    def inputs():
        both = {"max_latent_length": 2, "motion_flow": 5, **options}
        if both.get("generator") == "list":
            both["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return generation_inputs(**both)

    assert relative_difference(model, inputs) < 1e-4


@pytest.mark.parametrize("options", [{}, IMAGE], ids=["", "image guidance"])
def test_given_frames_are_read_as_in_the_plain_loop(options):
    model = make_model(frames=3)

    def inputs():
        latents = [torch.ones(2, 4, 8, 12), torch.zeros(2, 4, 8, 12)]
        return generation_inputs(max_latent_length=3, motion_flow=5, latents=latents, **options)

    assert relative_difference(model, inputs) < 1e-4


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_image_guidance_adds_to_every_frame_what_it_adds_in_the_plain_loop(model):
    """With rotary positions that is nothing at the first frame, where no pass sees a picture."""
    model = make_model(frames=3, **model)

    def inputs(scale):
        return generation_inputs(max_latent_length=3, motion_flow=5, image_guidance_scale=scale)

    found = model(inputs(1.5))["x"] - model(inputs(0))["x"]
    plain = [reference_nova.generate(model, inputs(scale)) for scale in (1.5, 0)]
    expected = plain[0] - plain[1]
    assert expected.abs().amax((0, 1, 3, 4))[1:].min() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_losses_and_gradients_are_those_of_the_plain_formulation(model, scheduler, length):
    model = make_model(frames=3, **model).train()
    model.noise_scheduler = scheduler()
    model.text_embed.dropout = 0
    x = torch.randn(2, 4, length, 8, 12, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x.squeeze(2), "prompt": make_prompts(2), "motion_flow": [4.0, 5.0]}
    results = []
    for losses in (lambda: model(dict(inputs)), lambda: reference_nova.train(model, inputs)):
        reference_nova.seed_all(0)
        model.zero_grad()
        values = losses()
        sum(values.values()).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append(({name: value.detach() for name, value in values.items()}, gradients))
    (found, found_gradients), (expected, gradients) = results
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-5, rtol=1e-3)
