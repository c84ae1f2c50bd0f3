"""Schedulers: what they add to diffusers' and where they differ."""

import diffusers
import pytest
import torch

from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_equals_that_of_diffusers(shift):
    ours = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(25)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    if shift == 1.0:
        assert ours.timesteps[[0, 1, -2, -1]].tolist() == [1000.0, 958.375, 42.625, 1.0]


def test_the_second_place_of_a_flow_schedule_is_its_shift():
    ours = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours.set_timesteps(7, 0.5)
    theirs.set_timesteps(7, mu=0.5)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    with pytest.raises(TypeError, match="mu, the second argument of set_timesteps, .* got 'cpu'"):
        ours.set_timesteps(7, "cpu")


def test_a_flow_step_takes_its_arguments_in_place_and_keeps_the_dtype_of_the_sample():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x, flow = torch.randn(2, 2, 3)
    sigma, after = scheduler.sigmas[:2]
    (stepped,) = scheduler.step(flow.bfloat16(), scheduler.timesteps[0], x, None, False)
    assert stepped.dtype == torch.float32
    torch.testing.assert_close(stepped, x + (after - sigma) * flow, atol=1e-2, rtol=1e-2)
    output = scheduler.step(flow, scheduler.timesteps[1], x, torch.Generator())
    assert output.prev_sample.shape == x.shape and scheduler.step_index == 2


def test_sampling_leaves_the_training_tables_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    x, noise = torch.randn(2, 3, 4, 5)
    index = torch.tensor([[0, 500, 999, 3]] * 3)
    before = scheduler.add_noise(x, noise, index)
    scheduler.set_timesteps(5)
    scheduler.set_shift(7.0)
    assert torch.equal(scheduler.add_noise(x, noise, index), before)


def test_flow_noise_is_the_straight_path():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x, noise = torch.randn(2, 2, 4, 5)
    index = torch.tensor([0, 999])
    noisy, timestep = scheduler.corrupt(x, noise, index)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(noisy[1], 0.001 * noise[1] + 0.999 * x[1])
    torch.testing.assert_close(timestep, torch.tensor([1000.0, 1.0]))


def test_half_precision_noise_levels_are_not_rounded():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x, noise = torch.randn(2, 1000, 4).bfloat16()
    index = torch.arange(1000)
    half, timestep = scheduler.corrupt(x, noise, index)
    full, _ = scheduler.corrupt(x.float(), noise.float(), index)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())
    assert timestep.unique().numel() == 1000


def test_a_scheduler_survives_its_config():
    again = FlowMatchEulerDiscreteScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(shift=2.5).config
    )
    assert again.shift == 2.5
    again = DDPMScheduler.from_config(DDPMScheduler(prediction_type="sample").config)
    assert again.config.prediction_type == "sample"


def test_training_indices_are_logit_normal():
    index = FlowMatchEulerDiscreteScheduler().sample_timesteps((200, 100))
    assert index.dtype == torch.int64 and 0 <= index.min() and index.max() < 1000
    assert ((index > 250) & (index < 750)).float().mean() == pytest.approx(0.728, abs=0.02)


def test_ddpm_does_not_clip():
    x, m = torch.randn(2, 2, 4, 8, 8) * 5
    steps = {}
    for cls, options in (
        (DDPMScheduler, {"clip_sample": True, "thresholding": True}),
        (diffusers.DDPMScheduler, {"clip_sample": False}),
    ):
        scheduler = cls(**options)
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(0)
        steps[cls] = scheduler.step(m, scheduler.timesteps[3], x, generator=generator).prev_sample
    torch.testing.assert_close(*steps.values())


def test_ddpm_takes_timesteps_of_any_shape():
    scheduler = DDPMScheduler()
    x, noise = torch.randn(2, 3, 4, 5)
    one = scheduler.add_noise(x, noise, torch.full((3,), 7))
    each = scheduler.add_noise(x, noise, torch.full((3, 4), 7))
    assert torch.equal(one, each)
    assert scheduler.get_velocity(x, noise, torch.full((3, 4), 7)).shape == x.shape


def test_a_variance_without_a_root_is_refused():
    scheduler = DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="fixed_large_log"):
        scheduler.step(x, 500, x)


def test_steps_and_timesteps_together_are_refused():
    with pytest.raises(ValueError, match="one of"):
        DDPMScheduler().set_timesteps(10, timesteps=[5, 3])
