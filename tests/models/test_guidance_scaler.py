"""Guidance: the formulas, pass by pass."""

import pytest
import torch

from diffnext.models.guidance_scaler import GuidanceScaler


def test_without_guidance_nothing_is_added():
    guidance = GuidanceScaler(guidance_scale=1, image_guidance_scale=3)
    x = torch.randn(2, 3)
    assert guidance.num_passes == 1
    assert torch.equal(guidance.expand(x), x) and torch.equal(guidance.scale(x), x)


def test_two_passes():
    cond, uncond = torch.randn(2, 4, 3, 5)
    guided = GuidanceScaler(guidance_scale=4).scale(torch.cat([cond, uncond]))
    torch.testing.assert_close(guided, uncond + 4 * (cond - uncond))


def test_image_guidance():
    guidance = GuidanceScaler(guidance_scale=4, image_guidance_scale=2)
    cond, uncond, image = torch.randn(3, 2, 5)
    expected = uncond + 4 * (cond - image) + 2 * (image - uncond)
    torch.testing.assert_close(guidance.scale(torch.cat([cond, uncond, image])), expected)
    c = torch.cat([cond, uncond])
    assert torch.equal(guidance.expand_text(c), torch.cat([cond, uncond, uncond]))
    assert torch.equal(guidance.scale(torch.cat([cond, image, image])), image + 4 * (cond - image))


def test_image_guidance_shows_pass_one_the_padding_and_the_others_the_picture():
    guidance = GuidanceScaler(guidance_scale=4, image_guidance_scale=2)
    tokens, padding = torch.randn(2, 3, 5), torch.randn(1, 5)
    passes = guidance.expand(tokens, padding=padding).chunk(3)
    assert torch.equal(passes[0], tokens) and torch.equal(passes[2], tokens)
    assert torch.equal(passes[1], padding.expand(2, 3, 5))
    assert torch.equal(guidance.expand(tokens), torch.cat([tokens] * 3))


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ({"guidance_scale": 1, "image_guidance_scale": 2}, 1),
        ({"guidance_scale": 4}, 2),
        ({"guidance_scale": 4, "spatiotemporal_guidance_scale": 2}, 3),
    ],
)
def test_without_image_guidance_every_pass_is_shown_the_picture(weights, passes):
    tokens = torch.randn(2, 3, 5)
    expanded = GuidanceScaler(**weights).expand(tokens, padding=torch.randn(1, 5))
    assert torch.equal(expanded, torch.cat([tokens] * passes))


def test_spatiotemporal_guidance():
    guidance = GuidanceScaler(guidance_scale=4, spatiotemporal_guidance_scale=2)
    cond, uncond, perturbed = torch.randn(3, 2, 5)
    expected = uncond + 4 * (cond - uncond) + 2 * (cond - perturbed)
    torch.testing.assert_close(guidance.scale(torch.cat([cond, uncond, perturbed])), expected)
    c = torch.cat([cond, uncond])
    assert torch.equal(guidance.expand_text(c), torch.cat([cond, uncond, cond]))


def test_renormalisation_brings_the_norm_down_to_the_conditional_one():
    guidance = GuidanceScaler(guidance_scale=8, guidance_renorm=0.01)
    cond, uncond = torch.randn(2, 3, 4, 5)
    guided = guidance.scale(torch.cat([cond, uncond])).flatten(1).norm(dim=1)
    plain = (uncond + 8 * (cond - uncond)).flatten(1).norm(dim=1)
    torch.testing.assert_close(guided, torch.minimum(plain, cond.flatten(1).norm(dim=1)))


def test_renormalisation_has_a_floor():
    cond, uncond = torch.randn(2, 3, 4)
    plain = GuidanceScaler(guidance_scale=50).scale(torch.cat([cond, uncond]))
    guided = GuidanceScaler(guidance_scale=50, guidance_renorm=0.5).scale(torch.cat([cond, uncond]))
    torch.testing.assert_close(guided, 0.5 * plain)


@pytest.mark.parametrize("name", ["image_guidance_scale", "spatiotemporal_guidance_scale"])
def test_renormalisation_leaves_what_the_third_pass_adds(name):
    cond, uncond, third = torch.randn(3, 2, 6, 4)
    passes = torch.cat([cond, uncond, third])
    plain = GuidanceScaler(8, **{name: 3})
    renormalised = GuidanceScaler(8, guidance_renorm=0.2, **{name: 3})
    added = 3 * ((third - uncond) if name == "image_guidance_scale" else (cond - third))
    guided = plain.scale(passes) - added
    ratio = (cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)).clamp(0.2, 1)
    expected = guided * ratio[:, None, None] + added
    torch.testing.assert_close(renormalised.scale(passes), expected)


@pytest.mark.parametrize(
    "weights", [{}, {"image_guidance_scale": 2}, {"spatiotemporal_guidance_scale": 2}]
)
def test_the_weight_of_the_prompt_may_be_another_at_each_set(weights):
    passes = torch.randn(3 if weights else 2, 2, 4).flatten(0, 1)
    at_three = GuidanceScaler(guidance_scale=3, **weights).scale(passes)
    growing = GuidanceScaler(guidance_scale=5, min_guidance_scale=1, **weights)
    torch.testing.assert_close(growing.scale(passes, growing.scale_at(0.5)), at_three)
    assert growing.num_passes == (3 if weights else 2)


def test_the_scale_grows_from_its_minimum():
    guidance = GuidanceScaler(guidance_scale=5, min_guidance_scale=0)
    assert [guidance.scale_at(p) for p in (0, 0.5, 1)] == [0, 2.5, 5]
    assert GuidanceScaler(guidance_scale=5).scale_at(0.5) == 5


def test_guidance_stops_below_the_timestep():
    guidance = GuidanceScaler(guidance_scale=5, guidance_trunc=300)
    assert guidance.is_off(299.0) and not guidance.is_off(300.0)
    assert not GuidanceScaler(guidance_scale=5).is_off(0.0)


def test_two_extra_passes_are_refused():
    with pytest.raises(ValueError, match="cannot be combined, got 1.0 and 2.0"):
        GuidanceScaler(5, image_guidance_scale=1, spatiotemporal_guidance_scale=2)


def test_an_interval_switches_guidance_off_outside():
    scaler = GuidanceScaler(guidance_scale=5, guidance_interval=(200, 800), guidance_trunc=300)
    assert [scaler.is_off(t) for t in (900, 800, 500, 299, 100)] == [True, False, False, True, True]
    assert not GuidanceScaler(guidance_scale=1, guidance_interval=(200, 800)).is_off(900)
    with pytest.raises(ValueError, match=r"least and the greatest timestep, got \(800.0, 200.0\)"):
        GuidanceScaler(guidance_scale=5, guidance_interval=(800, 200))
