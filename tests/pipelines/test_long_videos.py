"""Long videos: drawn only from the latest frames, learnt from frames with noise in them."""

import pytest
import torch

from diffnext.pipelines.nova.sampling import GenerationRequest, GenerationRun, generate_frames
from diffnext.schedulers.denoising_run import DenoisingRun
from tests.pipelines.conftest import QUICK, make_video_pipeline
from tests.tiny import make_model, make_prompts

ROTARY = {"rotary_pos_embed": True, "arch": ["vit_d2w64", "vit_d4w64", "mlp_d2w64"]}
POSITIONS = {"tables": {}, "rotary": ROTARY}


@pytest.fixture(params=POSITIONS)
def model(request):
    return make_model(frames=3, **POSITIONS[request.param])


def draw(model, given, length, **options):
    """The latents of a video that continues given frames, (B, C, T, h, w)."""
    pipe = make_video_pipeline(transformer=model, scheduler=model.sample_scheduler)
    options = {"guidance_scale": 3, "output_type": "latent", **QUICK, **options}
    return pipe(
        "a cat",
        latents=list(given),
        max_latent_length=length,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).frames


def test_a_window_of_all_frames_changes_no_bit(model):
    given = torch.randn(1, 1, 4, 8, 12)
    whole = draw(model, given, 4)
    assert torch.equal(whole, draw(model, given, 4, max_context_frames=3))
    assert torch.equal(whole, draw(model, given, 4, max_context_frames=50))
    assert not torch.equal(whole[:, :, 2:], draw(model, given, 4, max_context_frames=1)[:, :, 2:])


def test_frames_outside_of_the_window_are_forgotten(model):
    """Of two frames and by two layers, the sixth frame depends on the three before it."""
    given = torch.randn(5, 1, 4, 8, 12)
    last = draw(model, given, 6, max_context_frames=2)[:, :, -1]
    for index, is_seen in enumerate([False, False, True, True, True]):
        other = given.clone()
        other[index] = torch.randn(1, 4, 8, 12)
        drawn = draw(model, other, 6, max_context_frames=2)[:, :, -1]
        assert torch.equal(drawn, last) != is_seen, index
        whole = draw(model, other, 6)[:, :, -1]
        assert not torch.equal(whole, draw(model, given, 6)[:, :, -1])


def states_of(model, length, **options):
    """What the video encoder says of each frame of a still video, and the drawing."""
    found = []
    hook = model.video_encoder.register_forward_hook(lambda *args: found.append(args[2]))
    still = torch.randn(1, 4, 8, 12)
    request = GenerationRequest(
        latent_shape=(1, 4, 8, 12),
        num_preds=(24,),
        max_latent_length=length,
        prompt=make_prompts(1),
        latents=[still] * (length - 1),
        **options,
    )
    run = GenerationRun(DenoisingRun(model.sample_scheduler, 2, None))
    list(generate_frames(model, request, run))
    hook.remove()
    return found, run


def test_far_frames_are_read_as_near_ones_were():
    """With rotary positions a long still video looks the same at any time, the prompt included."""
    found, _ = states_of(make_model(frames=3, **ROTARY), 12, max_context_frames=2)
    torch.testing.assert_close(found[8], found[11])
    found, _ = states_of(make_model(frames=3, **ROTARY), 12)
    assert (found[8] - found[11]).abs().max() > 1e-4


@pytest.mark.parametrize(("length", "frames"), [(4, 3), (12, 3), (3, 3), (2, 2)])
def test_the_cache_holds_the_window_and_no_more(model, length, frames):
    _, run = states_of(model, length, max_context_frames=2)
    condition = 7
    sizes = {layer.buffer.size(3) for layer in run.cache}
    assert sizes == {condition + frames * 6}


def test_a_stream_forgets_likewise(model):
    pipe = make_video_pipeline(transformer=model, scheduler=model.sample_scheduler)
    options = {"max_latent_length": 5, "max_context_frames": 1, "output_type": "latent", **QUICK}
    whole = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).frames
    pieces = list(pipe.stream("a cat", generator=torch.Generator().manual_seed(0), **options))
    assert torch.equal(torch.cat(pieces, dim=2), whole)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_in_earlier_frames(noise):
    model = make_model(frames=3).train()
    model.context_noise = noise
    video = torch.full((64, 4, 5, 8, 12), 10.0)
    disturbed = model.disturb(video)
    assert (disturbed is video) == (noise == 0)
    shares = 1 - disturbed.mean(dim=(1, 3, 4)) / 10  # of every frame: the noise has a mean of 0
    assert shares.min() > -0.05 and shares.max() < noise + 0.05
    assert abs(shares.mean() - noise / 2) < 0.02
    spread = disturbed.std(dim=(1, 3, 4))
    torch.testing.assert_close(spread, shares, atol=0.1, rtol=0)
    image = video[:, :, :1]
    assert model.disturb(image) is image


def test_what_is_learnt_stays_clean(monkeypatch):
    model = make_model(frames=3).train()
    model.context_noise = 1.0
    seen = []
    monkeypatch.setattr(model, "get_losses", lambda *args, **options: seen.append(args[1]) or {})
    x = torch.randn(2, 4, 3, 8, 12)
    model({"x": x, "prompt": make_prompts(2)})
    assert torch.equal(seen[0], x.transpose(1, 2).flatten(0, 1))
