"""Text to video and image to video through NOVAPipeline."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.pipelines.nova.pipeline_train_t2v import NOVATrainT2VPipeline
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.pipelines.conftest import QUICK, make_pipeline, make_video_pipeline, seeded
from tests.tiny import make_model


def picture(seed=0, size=(64, 96)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def clip(frames=5, seed=0, size=(64, 96)):
    return np.stack([picture(seed + t, size) for t in range(frames)])


def test_output_types_of_videos(video_pipe):
    options = {"max_latent_length": 3, **QUICK}
    frames = video_pipe(["a cat", "a dog"], generator=seeded(), **options).frames
    assert frames.shape == (2, 9, 64, 96, 3) and frames.dtype == np.uint8
    tensor = video_pipe(["a cat", "a dog"], generator=seeded(), output_type="pt", **options).frames
    assert tensor.shape == (2, 3, 9, 64, 96)
    latents = video_pipe("a cat", output_type="latent", **options).frames
    assert latents.shape == (1, 4, 3, 8, 12)
    image = video_pipe("a cat", **QUICK).frames
    assert image.shape == (1, 1, 64, 96, 3)


def test_num_frames_stands_for_latent_frames(video_pipe):
    by_frames = video_pipe("a cat", num_frames=9, generator=seeded(), **QUICK).frames
    by_latents = video_pipe("a cat", max_latent_length=3, generator=seeded(), **QUICK).frames
    assert np.array_equal(by_frames, by_latents)


def test_an_image_model_makes_one_frame():
    with pytest.raises(ValueError, match="num_frames is for videos, but this is an image"):
        make_pipeline()("a cat", num_frames=5, **QUICK)


def test_the_video_starts_with_the_image(video_pipe):
    options = {"max_latent_length": 2, "output_type": "latent", **QUICK}
    latents = video_pipe("a cat", image=picture(), generator=seeded(), **options).frames
    x = torch.as_tensor(picture()).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)
    with torch.no_grad():
        posterior = video_pipe.vae.encode(x).latent_dist
    first = video_pipe.vae.scale_(posterior.sample(seeded()))
    torch.testing.assert_close(latents[:, :, 0], first)


def test_one_image_a_prompt(video_pipe):
    images = [picture(0), Image.fromarray(picture(1))]
    options = {"max_latent_length": 2, "num_images_per_prompt": 2, "output_type": "latent"}
    generators = [seeded(i) for i in range(4)]
    latents = video_pipe(
        ["a cat", "a dog"], image=images, generator=generators, **options, **QUICK
    ).frames
    for row, image in enumerate([0, 0, 1, 1]):
        alone = video_pipe(
            "a cat" if row < 2 else "a dog",
            image=picture(image),
            generator=[seeded(row)],
            max_latent_length=2,
            output_type="latent",
            **QUICK,
        ).frames
        torch.testing.assert_close(latents[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_pictures_of_other_sizes_are_covered_and_cut(video_pipe):
    wide = Image.fromarray(picture(size=(128, 400)))
    options = {"max_latent_length": 2, "output_type": "latent", **QUICK}
    by_default = video_pipe("a cat", image=wide, generator=seeded(), **options).frames
    cut = wide.resize((200, 64), Image.Resampling.LANCZOS).crop((52, 0, 148, 64))
    by_hand = video_pipe("a cat", image=cut, generator=seeded(), **options).frames
    torch.testing.assert_close(by_default, by_hand)
    filled = video_pipe("a cat", image=wide, generator=seeded(), resize_mode="fill", **options)
    assert not torch.equal(filled.frames, by_default)


@pytest.mark.parametrize(
    "given",
    [
        clip(),
        list(clip()),
        [Image.fromarray(frame) for frame in clip()],
        torch.as_tensor(clip()).movedim(-1, 1),
        torch.as_tensor(clip()).movedim(-1, 0)[None] / 255,
    ],
    ids=["array", "arrays", "pictures", "tensor", "output tensor"],
)
def test_a_video_continues_given_frames(video_pipe, given):
    options = {"num_frames": 13, "output_type": "latent", **QUICK}
    continued = video_pipe(["a cat", "a dog"], video=given, generator=seeded(), **options).frames
    x = torch.as_tensor(clip()).movedim(-1, 0)[None].float().sub(127.5).div(127.5)
    with torch.no_grad():
        posterior = video_pipe.vae.encode(x).latent_dist
    first = video_pipe.vae.scale_(posterior.sample(seeded()))
    assert continued.shape == (2, 4, 4, 8, 12)
    for sample in continued:
        torch.testing.assert_close(sample[:, :2], first[0], atol=1e-5, rtol=1e-5)


def test_every_given_frame_matters(video_pipe):
    """A result that only knew the last given frame would not change with the first."""
    latents = [torch.randn(1, 4, 8, 12) for _ in range(2)]
    options = {"max_latent_length": 3, "output_type": "latent", **QUICK}
    one = video_pipe("a cat", latents=latents, generator=seeded(), **options).frames
    latents = [torch.randn(1, 4, 8, 12), latents[1]]
    other = video_pipe("a cat", latents=latents, generator=seeded(), **options).frames
    assert not torch.allclose(one[:, :, 2], other[:, :, 2])


@pytest.mark.parametrize("num_latents", [1, 3, 5, 7, 9])
def test_streamed_tiles_are_the_whole_video(video_pipe, num_latents):
    options = {"max_latent_length": num_latents, "output_type": "pt", **QUICK}
    whole = video_pipe("a cat", generator=seeded(), **options).frames
    pieces = list(video_pipe.stream("a cat", generator=seeded(), **options))
    assert [piece.size(2) for piece in pieces] == {
        1: [1],
        3: [9],
        5: [17],
        7: [17, 8],
        9: [17, 16],
    }[num_latents]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole)


def test_the_first_piece_comes_before_the_last_frame(video_pipe):
    frames = []
    options = {"callback_on_step_end": lambda pipe, step, frame, _: frames.append(frame)}
    stream = video_pipe.stream("a cat", num_frames=33, generator=seeded(), **options, **QUICK)
    assert frames == []
    first = next(stream)
    assert first.shape == (1, 17, 64, 96, 3) and max(frames) == 4
    assert next(stream).shape == (1, 16, 64, 96, 3) and max(frames) == 8
    assert next(stream, None) is None


def test_streamed_latents_repeat_none(video_pipe):
    options = {"max_latent_length": 7, "output_type": "latent", **QUICK}
    whole = video_pipe("a cat", generator=seeded(), **options).frames
    pieces = list(video_pipe.stream("a cat", generator=seeded(), **options))
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_an_image_model_streams_one_piece():
    pipe = make_pipeline()
    options = {"output_type": "pt", **QUICK}
    (piece,) = pipe.stream("a cat", generator=seeded(), **options)
    assert torch.equal(piece, pipe("a cat", generator=seeded(), **options).images)


def test_streams_check_their_arguments_at_once(video_pipe):
    with pytest.raises(ValueError, match="max_latent_length must be greater than"):
        video_pipe.stream("a cat", max_latent_length=0)


@pytest.mark.parametrize(
    ("stopped_in", "sizes"), [(0, [1]), (1, [1]), (2, [5]), (4, [13]), (5, [17]), (6, [17, 4])]
)
def test_a_stream_can_be_interrupted(video_pipe, stopped_in, sizes):
    def stop(pipe, step, frame, kwargs):
        pipe._interrupt = frame == stopped_in
        return {}

    options = {"max_latent_length": 9, "output_type": "pt", **QUICK}
    pieces = list(video_pipe.stream("a cat", callback_on_step_end=stop, **options))
    assert [piece.size(2) for piece in pieces] == sizes


@pytest.mark.parametrize(("last_step", "num_frames"), [(6, 2), (7, 2), (8, 3)])
def test_an_interrupted_video_ends_with_its_last_whole_frame(video_pipe, last_step, num_frames):
    seen = []

    def stop(pipe, step, frame, kwargs):
        seen.append((step, frame))
        pipe._interrupt = step == last_step
        return {}

    options = {"max_latent_length": 3, "output_type": "latent", **QUICK}
    whole = video_pipe("a cat", generator=seeded(), **options).frames
    cut = video_pipe("a cat", generator=seeded(), callback_on_step_end=stop, **options).frames
    assert torch.equal(cut, whole[:, :, :num_frames])
    assert seen == [(step, step // 3) for step in range(last_step + 1)]
    again = video_pipe("a cat", generator=seeded(), **options).frames
    assert torch.equal(again, whole)  # nothing is left of the interruption


def test_videos_from_a_diffusion_schedule():
    pipe = make_video_pipeline(scheduler=DDPMScheduler())
    frames = pipe("a cat", max_latent_length=2, generator=seeded(), **QUICK).frames
    assert frames.shape == (1, 5, 64, 96, 3)


def test_motion_matters(video_pipe):
    options = {"output_type": "latent", **QUICK}
    slow, fast = (
        video_pipe("a cat", motion_flow=flow, generator=seeded(), **options).frames
        for flow in (1, 9)
    )
    assert not torch.equal(slow, fast)


def test_progress_bars_take_the_users_configuration(video_pipe, capsys):
    options = {**QUICK, "disable_progress_bar": False}
    video_pipe.set_progress_bar_config(desc="frames of a cat")
    video_pipe("a cat", max_latent_length=2, **options)
    assert "frames of a cat: 100%" in capsys.readouterr().err
    video_pipe.set_progress_bar_config(disable=True)
    video_pipe("a cat", max_latent_length=2, **options)
    assert capsys.readouterr().err == ""


def test_training_and_generating_in_turns_equals_fresh_objects():
    """One object, clips of changing lengths, against an object for each task."""

    def make():
        pipe = make_video_pipeline()
        return pipe, NOVATrainT2VPipeline(**pipe.components)

    def train(trainer, frames):
        model = trainer.configure_model(make_config())
        torch.manual_seed(frames)
        np.random.seed(frames)
        moments = torch.randn(1, 8, frames, 8, 12)
        losses = model({"latents": moments, "prompt": ["a cat"], "motion_flow": [3.0]})
        sum(losses.values()).backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.stack([*losses.values(), *norms]).detach()

    def generate(pipe, frames):
        options = {"max_latent_length": frames, "output_type": "latent", **QUICK}
        return pipe("a cat", generator=seeded(frames), **options).frames

    shared = make()
    for frames in (3, 5, 2):
        assert torch.equal(train(shared[1], frames), train(make()[1], frames))
        assert torch.equal(generate(shared[0], frames + 1), generate(make()[0], frames + 1))


def test_generating_with_a_model_in_training_drops_no_prompt(video_pipe):
    options = {"max_latent_length": 2, "output_type": "latent", **QUICK}
    expected = video_pipe("a cat", generator=seeded(), **options).frames
    video_pipe.transformer.text_embed.dropout = 1.0
    video_pipe.transformer.train()
    assert torch.equal(video_pipe("a cat", generator=seeded(), **options).frames, expected)


def test_the_autoencoder_may_have_another_type_than_the_model(video_pipe):
    options = {"max_latent_length": 2, "output_type": "pt", **QUICK}
    expected = video_pipe("a cat", image=picture(), generator=seeded(), **options).frames
    video_pipe.vae.double()
    mixed = video_pipe("a cat", image=picture(), generator=seeded(), **options).frames
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.float(), expected, atol=1e-3, rtol=1e-3)


def test_latents_are_made_without_an_autoencoder():
    pipe = make_video_pipeline(vae=None)
    options = {"output_type": "latent", **QUICK}
    assert pipe("a cat", max_latent_length=2, **options).frames.shape == (1, 4, 2, 8, 12)
    with pytest.raises(ValueError, match="needs a video autoencoder .* not NoneType"):
        pipe("a cat", num_frames=5, **options)


def make_config():
    from omegaconf import OmegaConf

    return OmegaConf.create({"model": {"loss_repeat": 2}})


def test_another_family_of_schedulers_is_reported(video_pipe, caplog):
    video_pipe.scheduler = DDPMScheduler()
    with caplog.at_level(logging.WARNING):
        video_pipe("a cat", **QUICK)
    assert "DDPMScheduler is for models that predict the noise" in caplog.text


def test_a_mixer_survives_saving(tmp_path):
    pipe = make_video_pipeline(transformer=make_model(frames=3, video_mixer_rank=8))
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    options = {"max_latent_length": 2, "output_type": "latent", **QUICK}
    results = [one("a cat", generator=seeded(), **options).frames for one in (pipe, loaded)]
    assert torch.equal(*results)
