"""``callback_on_step_end``: what it sees, what it changes, and what it cannot break."""

import numpy as np
import pytest
import torch

from tests.pipelines.conftest import PROMPTS, QUICK, make_pipeline, seeded
from tests.tiny import make_model


def call(pipe, kind, callback=None, name="__call__", **options):
    options = {"generator": seeded(), "output_type": "latent", **QUICK, **options}
    if kind == "video":
        options = {"max_latent_length": 2, **options}
    return getattr(pipe, name)(PROMPTS[kind], callback_on_step_end=callback, **options)


def draw(pipe, kind, callback=None, **options):
    """Latents, (B, C, T, h, w)."""
    return call(pipe, kind, callback, return_dict=False, **options)[0]


def stream(pipe, kind, callback=None, **options):
    return torch.cat(list(call(pipe, kind, callback, "stream", **options)), dim=2)


def return_new(pipe, step, frame, kwargs):
    return {"latents": -2 * kwargs["latents"]}


def edit_and_return(pipe, step, frame, kwargs):
    kwargs["latents"].mul_(-2)
    return kwargs


def edit_alone(pipe, step, frame, kwargs):
    kwargs["latents"].mul_(-2)


def edit_by_numpy(pipe, step, frame, kwargs):
    array = kwargs["latents"].numpy()
    array *= -2
    return {}


def put_into_the_dict(pipe, step, frame, kwargs):
    kwargs["latents"] = -2 * kwargs["latents"]


@pytest.mark.parametrize("way", [draw, stream])
def test_what_is_returned_and_what_is_edited_goes_on(pipes, kind, way):
    plain = way(pipes[kind], kind)
    ways = (return_new, edit_and_return, edit_alone, edit_by_numpy, put_into_the_dict)
    results = [way(pipes[kind], kind, callback) for callback in ways]
    assert all(torch.equal(one, results[0]) for one in results)
    assert not torch.allclose(results[0], plain)


def test_edits_go_on_where_a_token_is_a_single_latent():
    """Frames are then views of their tokens."""
    pipe = make_pipeline(transformer=make_model(image_stride=16), vae=None)
    edited, returned, plain = (draw(pipe, "text", one) for one in (edit_alone, return_new, None))
    assert torch.equal(edited, returned) and not torch.allclose(edited, plain)


def test_changed_tokens_are_what_later_sets_and_frames_are_drawn_from(pipes):
    seen = []

    def change(pipe, step, frame, kwargs):
        seen.append(kwargs["latents"].clone())
        return {"latents": kwargs["latents"] + (step == 0)}

    plain, changed = (draw(pipes["video"], "video", one) for one in (None, change))
    first = seen[0].ne(0)  # the tokens of the first set
    assert torch.equal(changed[:, :, 0][first], plain[:, :, 0][first] + 1)
    assert torch.equal(seen[1][first], seen[0][first] + 1)
    assert not torch.allclose(changed[:, :, 0][~first], plain[:, :, 0][~first])
    assert not torch.allclose(changed[:, :, 1], plain[:, :, 1])


def test_tokens_that_are_not_predicted_yet_cannot_be_changed(pipes, kind):
    zeros = []

    def fill(pipe, step, frame, kwargs):
        hidden = kwargs["latents"] == 0
        zeros.append(hidden.float().mean().item())
        kwargs["latents"][hidden] = 7.0

    assert torch.equal(draw(pipes[kind], kind, fill), draw(pipes[kind], kind))
    assert zeros[:3] == sorted(zeros[:3], reverse=True) and zeros[0] > zeros[2] == 0

    def fill_and_stop(pipe, step, frame, kwargs):
        fill(pipe, step, frame, kwargs)
        pipe._interrupt = True

    cut = draw(pipes[kind], kind, fill_and_stop)
    assert (cut == 0).float().mean() == zeros[0] and not (cut == 7.0).any()


def test_what_a_callback_keeps_stays_as_it_was(pipes, kind):
    kept, copies = [], []

    def keep(pipe, step, frame, kwargs):
        kept.append(kwargs["latents"])
        copies.append(kwargs["latents"].clone())
        return kwargs

    drawn = draw(pipes[kind], kind, keep)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    kept[-1].zero_()
    assert drawn[:, :, -1].any()


@pytest.mark.parametrize("value", [None, {}, "kwargs"])
def test_a_callback_may_return_nothing(pipes, kind, value):
    def look(pipe, step, frame, kwargs):
        return kwargs if value == "kwargs" else value

    assert torch.equal(draw(pipes[kind], kind, look), draw(pipes[kind], kind))


LATENTS = torch.zeros(1, 4, 8, 12)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"latents": LATENTS[0]}, "got (4, 8, 12), torch.float32, on cpu"),
        ({"latents": LATENTS.expand(2, -1, -1, -1)}, "got (2, 4, 8, 12)"),
        ({"latents": LATENTS.unsqueeze(2)}, "got (1, 4, 1, 8, 12)"),
        ({"latents": LATENTS.half()}, "got (1, 4, 8, 12), torch.float16"),
        ({"latents": LATENTS.double()}, "torch.float64"),
        ({"latents": LATENTS.to("meta")}, "on meta"),
        ({"latents": LATENTS.numpy()}, "torch.float32, on cpu, got ndarray"),
        ({"latents": None}, "torch.float32, on cpu, got NoneType"),
        (LATENTS, "must return a dict or None, got Tensor"),
        ((LATENTS,), "must return a dict or None, got tuple"),
        (True, "must return a dict or None, got bool"),
        ({"latent": LATENTS}, "may return only 'latents', got ['latent']"),
        ({"latents": LATENTS, "prompt_embeds": LATENTS}, "got ['latents', 'prompt_embeds']"),
    ],
)
def test_what_cannot_go_on_is_named(pipes, kind, returned, words):
    expected = draw(pipes[kind], kind)
    with pytest.raises((TypeError, ValueError)) as caught:
        draw(pipes[kind], kind, lambda *_: returned)
    assert words in str(caught.value) and "callback_on_step_end" in str(caught.value)
    assert torch.equal(draw(pipes[kind], kind), expected)


def test_callbacks_are_given_the_pipeline_and_all_tensors_that_are_documented(pipes, kind):
    pipe = pipes[kind]
    seen = []
    names = pipe._callback_tensor_inputs
    for inputs in ({}, {"callback_on_step_end_tensor_inputs": list(names)}):
        draw(pipe, kind, lambda given, *rest: seen.append((given, rest[2])), **inputs)
    assert all(given is pipe and list(kwargs) == names for given, kwargs in seen)
    assert all(isinstance(kwargs[name], torch.Tensor) for _, kwargs in seen for name in names)
    draw(pipe, kind, lambda *a: seen.append(a[3]), callback_on_step_end_tensor_inputs=())
    assert seen[-1] == {}


class Stopped(Exception):
    """Of the user's own."""


@pytest.mark.parametrize("way", [draw, stream])
@pytest.mark.parametrize("at", [0, 2])
def test_an_exception_of_a_callback_comes_out_unchanged(pipes, kind, way, at):
    expected = way(pipes[kind], kind)
    error = Stopped("enough")

    def stop(pipe, step, frame, kwargs):
        kwargs["latents"].zero_()
        if step == at:
            raise error

    pipes[kind].transformer.train()
    with pytest.raises(Stopped) as caught:
        way(pipes[kind], kind, stop)
    assert caught.value is error
    assert pipes[kind].transformer.training
    pipes[kind].transformer.eval()
    assert not pipes[kind].interrupt
    assert torch.equal(way(pipes[kind], kind), expected)


def numbers(pipe, kind, way=draw, **options):
    """The steps and frames that a callback is told."""
    told = []
    way(pipe, kind, lambda _, step, frame, kwargs: told.append((step, frame)), **options)
    return told


@pytest.mark.parametrize("way", [draw, stream])
@pytest.mark.parametrize("steps", [1, 3, 24, 60])
def test_steps_count_the_sets_that_hold_tokens(pipes, kind, steps, way):
    """Of 60 sets of 24 tokens, many are empty."""
    told = numbers(pipes[kind], kind, way, num_inference_steps=steps)
    frames = 2 if kind == "video" else 1
    sets, rest = divmod(len(told), frames)
    assert rest == 0 and told == [(step, step // sets) for step in range(sets * frames)]
    assert sets <= min(steps, 24) and (steps > 3 or sets == steps)


def test_given_frames_have_numbers_but_no_steps(pipes):
    given = torch.zeros(1, 4, 2, 8, 12)
    told = numbers(pipes["video"], "video", latents=given, max_latent_length=4)
    assert told == [(step, step // 3) for step in range(6, 12)]
    image = np.zeros((64, 96, 3), np.uint8)
    told = numbers(pipes["video"], "video", image=image)
    assert told == [(step, 1) for step in range(3, 6)]


def test_a_drawing_is_interrupted_where_it_is(pipes, kind):
    told = []

    def stop(pipe, step, frame, kwargs):
        told.append((pipe.interrupt, pipe._interrupt))
        pipe._interrupt = step == 1
        told.append((pipe.interrupt, pipe._interrupt))

    expected = draw(pipes[kind], kind)
    cut = draw(pipes[kind], kind, stop)
    assert told == [(False, False), (False, False), (False, False), (True, True)]
    done = cut.ne(0)
    assert cut.size(2) == 1 and torch.equal(cut[done], expected[:, :, :1][done])
    assert not pipes[kind].interrupt
    assert torch.equal(draw(pipes[kind], kind), expected)


def test_an_interruption_can_be_taken_back(pipes, kind):
    def hesitate(pipe, step, frame, kwargs):
        pipe._interrupt = True
        pipe._interrupt = False

    assert torch.equal(draw(pipes[kind], kind, hesitate), draw(pipes[kind], kind))


def test_an_interrupted_continuation_ends_with_the_given_frames(pipes):
    given = torch.randn(1, 4, 1, 8, 12)

    def stop(pipe, step, frame, kwargs):
        pipe._interrupt = True

    cut = draw(pipes["video"], "video", stop, latents=given, max_latent_length=3)
    assert torch.equal(cut, given)


def test_an_interrupted_drawing_keeps_what_was_changed(pipes):
    def change_and_stop(pipe, step, frame, kwargs):
        pipe._interrupt = step == 1
        return {"latents": kwargs["latents"] + 1}

    expected = draw(pipes["text"], "text", lambda *a: {"latents": a[3]["latents"] + 1})
    cut = draw(pipes["text"], "text", change_and_stop)
    done = cut.ne(0)
    assert 0 < done.float().mean() < 1
    torch.testing.assert_close(cut[done], expected[done] - 1)
