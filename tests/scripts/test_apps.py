"""What the apps do behind their pages; the pages themselves are in test_apps_browser.py."""

# ruff: noqa: E402 - without gradio, the apps cannot be imported

import gc
import html
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

gr = pytest.importorskip("gradio", reason="the apps need `pip install .[demo]`")

import app_nova_t2i
import app_nova_t2v
import show_parameters
from diffnext.apps import studio as studio_module
from diffnext.apps.page import MAX_SEED
from diffnext.apps.pictures import PicturePage
from diffnext.apps.studio import MAX_WAITING, Drawing, DrawRequest, Studio
from diffnext.apps.videos import VideoPage, check_upload, crop_image, make_presets
from diffnext.cli import app, init
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.model_card import Defaults, Ranges, read_defaults
from diffnext.utils import read_parameters

ROOT = Path(__file__).resolve().parents[2]
NOVA_TINY = ROOT / "assets" / "nova-tiny"
QUICK = {"guidance_scale": 2.5, "num_inference_steps": 4, "num_diffusion_steps": 5}
PLAIN = {"prompt": "a red star", "negative_prompt": "", "seed": 7, "randomize_seed": False}
VISITOR = SimpleNamespace(session_hash="local")
GREY = 229  # of what is not drawn yet


@pytest.fixture(scope="module")
def pipe():
    return NOVAPipeline.from_pretrained(NOVA_TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def video_pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-video"
    config = ROOT / "configs" / "nova_clips_t2v.yaml"
    assert init.main(["--config", str(config), "--output", str(folder), "--tiny"]) == 0
    return NOVAPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def studio(pipe):
    studio = Studio(pipe, "nova-tiny")
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def video_studio(video_pipe):
    studio = Studio(video_pipe, "random-video")
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def page(studio, tmp_path_factory):
    return PicturePage(studio, PicturePage.DEFAULTS, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def video_page(video_studio, tmp_path_factory):
    return VideoPage(video_studio, VideoPage.DEFAULTS, tmp_path_factory.mktemp("results"))


@pytest.fixture
def shows_each_set(monkeypatch):
    """A preview after every set, however long it takes."""
    monkeypatch.setattr(studio_module, "PREVIEW_PAUSE", 0)
    monkeypatch.setattr(studio_module, "PREVIEW_SHARE", 0)


def updates(page, before=(), **options):
    """What happens on a page when its form is filled in and sent."""
    form = {name: component.value for name, component in page.inputs.items()}
    return page.generate(VISITOR, list(before), *(form | PLAIN | QUICK | options).values())


def run(page, **options):
    """What a page shows in the end."""
    shown = {}
    for update in updates(page, **options):
        shown |= update
    return shown


def draw(page, **options):
    """The files that a page draws, and what they were made with."""
    return run(page, **options)[page.drawn]


def status(page, shown):
    return html.unescape(re.sub("<[^>]*>", "", shown[page.status]))


def pixels(drawn):
    return np.asarray(Image.open(drawn.path).convert("RGB"))


def make_request(**options):
    return DrawRequest(prompt="a ring", negative_prompt="", **{**QUICK, **options})


# --- pictures -------------------------------------------------------------------------------


def test_a_model_that_cannot_read_prompts_is_refused(pipe):
    parts = {**pipe.components, "text_encoder": None, "tokenizer": None}
    with pytest.raises(ValueError, match="a-model has no text_encoder and no tokenizer"):
        Studio(NOVAPipeline(**parts), "a-model")


def test_the_same_seed_draws_the_same_pictures(page):
    first, again, other = draw(page), draw(page), draw(page, seed=99)
    assert len(first) == 4
    for index in range(4):
        assert np.array_equal(pixels(first[index]), pixels(again[index]))
        assert first[index].path != again[index].path
        assert not np.array_equal(pixels(first[index]), pixels(other[index]))


def test_a_picture_is_drawn_again_from_its_own_parameters(page):
    result = draw(page, negative_prompt="a blue ring")[2]
    parameters = read_parameters(result.path)
    assert parameters == result.parameters
    assert parameters["seed"] == 9
    assert parameters["model"] == "nova-tiny" and parameters["precision"] == "float32"
    names = ("prompt", "negative_prompt", "seed", *QUICK)
    alone = draw(page, **{name: parameters[name] for name in names})[0]
    # Alone or beside others, sums are rounded differently, and WebP is lossy.
    difference = np.abs(pixels(result).astype(int) - pixels(alone).astype(int))
    assert difference.max() <= 8 and difference.mean() < 0.5


def test_seeds_begin_anew_after_the_last(page):
    results = draw(page, seed=MAX_SEED)
    assert [one.parameters["seed"] for one in results] == [MAX_SEED, 0, 1, 2]


def test_a_random_seed_is_told(page):
    seeds = []
    for _ in range(2):
        shown = run(page, randomize_seed=True)
        seeds.append(shown[page.inputs["seed"]])
        assert 0 <= seeds[-1] <= MAX_SEED
        assert shown[page.drawn][0].parameters["seed"] == seeds[-1]
    assert seeds[0] != seeds[1]


def test_guidance_of_one_and_a_negative_prompt_work(page):
    plain = draw(page, guidance_scale=1)
    with_negative = draw(page, guidance_scale=1, negative_prompt="x")
    assert np.array_equal(pixels(plain[0]), pixels(with_negative[0]))
    guided = draw(page, negative_prompt="a blue square")
    assert not np.array_equal(pixels(guided[0]), pixels(draw(page)[0]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": "  "}, "The prompt is empty."),
        (
            {"prompt": "red star " * 99},
            "The prompt has 199 tokens, the model reads 24: shorten it.",
        ),
        ({"negative_prompt": "a red ring " * 9}, "The negative prompt has 28 tokens, the"),
        ({"num_inference_steps": 0}, "num_inference_steps must be greater than or equal to 1, got"),
        ({"num_diffusion_steps": 2.5}, "num_diffusion_steps must be"),
        ({"guidance_scale": None}, "guidance_scale must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"prompt": None}, "prompt must be"),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_wrong_requests_are_explained(page, options, text):
    shown = run(page, **options)
    assert text in status(page, shown) and 'class="wrong"' in shown[page.status]
    assert page.drawn not in shown


@pytest.mark.parametrize("number", [0, 129, None, "4", float("nan")])
def test_numbers_that_no_slider_sends_are_refused(page, number):
    with pytest.raises(gr.Error, match=r"Inference steps must be 1 to 128, got") as refused:
        page.inputs["num_inference_steps"].preprocess(number)
    assert not refused.value.print_exception


def test_a_model_of_videos_draws_their_first_frame(video_studio, tmp_path):
    page = PicturePage(video_studio, PicturePage.DEFAULTS, tmp_path)
    assert all(pixels(one).shape == (64, 64, 3) for one in draw(page))


# --- what is seen while it is drawn, and afterwards -------------------------------------------


def test_a_picture_emerges_set_by_set(studio, shows_each_set):
    shares = []
    snapshots = list(studio.draw("a", make_request(num_inference_steps=16), [0, 1]))
    for snapshot in snapshots[1:]:
        assert snapshot.clips.shape == (2, 1, 64, 64, 3)
        shares.append((snapshot.clips == GREY).all(axis=-1).mean())
    assert shares[0] > 0.9 and shares[-1] < 0.01
    assert shares == sorted(shares, reverse=True)
    assert [isinstance(one, Drawing) for one in snapshots] == [False] * 14 + [True]


def test_previews_take_a_fifth_of_the_time_at_most(studio, monkeypatch):
    monkeypatch.setattr(studio_module, "PREVIEW_PAUSE", 3600)
    snapshots = list(studio.draw("a", make_request(), [0]))
    assert [one.clips is not None for one in snapshots] == [False, True, False, False, False, True]


def test_a_page_shows_previews_then_files(page, shows_each_set):
    shown = [update[page.results] for update in updates(page) if page.results in update]
    assert len(shown) == 5
    for text in shown[:-1]:
        assert text.count("data:image/jpeg;base64,") == 4
    assert "data:" not in shown[-1] and shown[-1].count("gradio_api/file=") == 12
    assert shown[-1].count('alt="a red star (seed ') == 4


def test_visitors_cannot_write_html(page):
    shown = run(page, prompt='<script src="x">"a\'b')
    for text in (shown[page.results], shown[page.gallery]):
        assert "<script" not in text and "&lt;script src=&quot;x&quot;&gt;" in text


def test_the_gallery_holds_what_is_still_there_the_newest_first(page):
    first = draw(page, seed=1)
    first[0].path.unlink()
    shown = run(page, before=first, seed=90)
    seeds = [one.parameters["seed"] for one in shown[page.drawn]]
    assert seeds == [90, 91, 92, 93, 2, 3, 4]
    assert shown[page.gallery].count("<li>") == 7
    assert shown[page.gallery].count(" download=") == 7


def test_settings_of_a_result_are_used_again(video_page):
    (result,) = draw(video_page, prompt="a ring", seed=5, max_latent_length=1, motion_flow=3)
    form = video_page.reuse([result], SimpleNamespace(index=0))
    values = dict(zip(video_page.inputs, form, strict=True))
    assert values.pop("image") == gr.skip()
    expected = {"prompt": "a ring", "seed": 5, "max_latent_length": 1, "motion_flow": 3}
    assert values == PLAIN | QUICK | expected


# --- one at a time, and stopping --------------------------------------------------------------


def test_a_stopped_picture_is_kept_with_what_is_not_drawn_in_grey(page):
    shown = {}
    for update in updates(page, num_inference_steps=16):
        shown |= update
        page.studio.stop("others have no say")
        if "Set 2 of 13" in shown.get(page.status, ""):
            page.studio.stop("local")
    text = status(page, shown)
    drawn = int(re.search(r"Stopped after set (\d+) of 13\. Grey parts are not drawn yet", text)[1])
    assert 2 <= drawn < 13
    for one in shown[page.drawn]:
        assert read_parameters(one.path)["stopped_after_sets"] == drawn
        assert (np.abs(pixels(one).astype(int) - GREY) < 8).mean() > 0.3
    assert "stopped_after_sets" not in draw(page)[0].parameters  # nothing is remembered


@pytest.mark.parametrize(("frame", "frames"), [(0, 1), (1, 1), (4, 13)])
def test_a_stopped_video_ends_with_its_last_whole_frames(video_page, frame, frames):
    shown = {}
    slow = {"num_inference_steps": 16, "num_diffusion_steps": 50}  # the button comes in time
    for update in updates(video_page, max_latent_length=5, **slow):
        shown |= update
        seen = re.search(r"Set (\d+) of 65", shown.get(video_page.status, ""))
        if seen and int(seen[1]) > 13 * frame:
            video_page.studio.stop("local")
    (result,) = shown[video_page.drawn]
    assert len(imageio.imread(result.path)) == frames
    assert status(video_page, shown).startswith("Stopped after set ")


def test_others_wait_and_see_their_place(studio):
    first = studio.draw("a", make_request(num_inference_steps=16, num_diffusion_steps=50), [0])
    next(first)
    others = [studio.draw(name, make_request(), [0]) for name in "bc"]
    assert [next(one).ahead for one in others] == [1, 2]
    studio.stop("b")  # leaves the queue
    assert list(others[0]) == []
    assert next(others[1]).ahead == 1
    last = list(first)[-1]
    assert last.done == last.total == 13  # was not disturbed
    *snapshots, drawing = others[1]
    assert [one.ahead for one in snapshots] == [0] * 5 and isinstance(drawing, Drawing)


def test_who_leaves_the_queue_is_told(page):
    first = page.studio.draw("other", make_request(num_inference_steps=64), [0])
    next(first)
    shown = {}
    for update in updates(page):
        shown |= update
        if "You are number 2 in the queue." in shown.get(page.status, ""):
            page.studio.stop("local")
    assert status(page, shown) == "You left the queue; nothing was drawn."
    assert page.drawn not in shown


def wait_until_idle(studio):
    list(studio.draw("last", make_request(), [0]))


def test_a_full_queue_is_told(page):
    wait_until_idle(page.studio)  # a drawing that was left may still end its set
    request = make_request(num_inference_steps=64, num_diffusion_steps=50)
    waiting = [page.studio.draw("x", request, [0]) for _ in range(MAX_WAITING + 1)]
    for one in waiting:
        next(one)
    assert "20 others are waiting" in status(page, run(page))
    page.studio.stop("x")
    wait_until_idle(page.studio)


def test_a_drawing_that_nobody_follows_ends(studio):
    drawing = studio.draw("a", make_request(num_inference_steps=16, num_diffusion_steps=50), [0])
    next(drawing)
    drawing.close()  # as when a page is closed
    last = list(studio.draw("b", make_request(), [0]))[-1]
    assert isinstance(last, Drawing)


def test_closing_stops_and_waits_for_the_drawing_in_progress(pipe):
    studio = Studio(pipe, "nova-tiny")
    drawing = studio.draw("a", make_request(num_inference_steps=16, num_diffusion_steps=50), [0])
    waiting = studio.draw("b", make_request(), [0])
    next(drawing), next(waiting)
    studio.close()
    last = list(drawing)[-1]
    assert isinstance(last, Drawing) and last.done < last.total
    assert list(waiting) == []


def test_progress_counts_sets_that_hold_tokens(studio, video_studio):
    for one, frames, expected in ((studio, 1, 13), (video_studio, 5, 5 * 13)):
        request = make_request(
            num_inference_steps=16, num_diffusion_steps=1, max_latent_length=frames
        )
        seen = list(one.draw("a", request, [0]))
        assert [snapshot.done for snapshot in seen] == [*range(expected + 1), expected]
        assert {snapshot.total for snapshot in seen[1:]} == {expected}
        assert seen[-2].seconds_left == 0 < seen[3].seconds_left


@pytest.mark.slow
def test_a_hundred_requests_leak_nothing(page):
    def count():
        gc.collect()
        tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
        return threading.active_count(), len(os.listdir("/proc/self/fd")), tensors

    quick = {"num_inference_steps": 2, "num_diffusion_steps": 1}
    run(page, **quick)
    before = count()
    for index in range(100):
        for _ in updates(page, **quick, prompt="" if index % 10 == 0 else "a ring"):
            if index % 10 == 1:
                page.studio.stop("local")
            if index % 10 == 2:
                break
    assert count() == before


# --- videos -----------------------------------------------------------------------------------


def test_presets_are_what_the_model_makes(video_page, video_pipe):
    choices = video_page.inputs["max_latent_length"].choices
    assert choices == [("17x64x64", 5), ("1x64x64", 1)]
    video_pipe.transformer.register_to_config(video_base_size=[16, 15, 24])
    try:
        presets = make_presets(video_pipe, 480, 768)
    finally:
        video_pipe.transformer.register_to_config(video_base_size=[5, 2, 2])
    assert presets == [("33x768x480", 9), ("17x768x480", 5), ("1x768x480", 1)]


def test_videos_repeat_and_carry_their_parameters(video_page):
    (first,), (again,) = draw(video_page), draw(video_page)
    assert first.path.read_bytes() == again.path.read_bytes()
    parameters = read_parameters(first.path)
    assert parameters["max_latent_length"] == 5 and parameters["motion_flow"] == 5
    assert parameters["prompt"] == "a red star" and parameters["seed"] == 7
    assert "image_sha256" not in parameters


def test_a_video_begins_with_its_picture(video_page, tmp_path):
    halves = np.zeros((32, 96, 4), np.uint8)
    halves[..., 3] = 255
    halves[:, :48] = (255, 0, 0, 255)
    Image.fromarray(halves, "RGBA").save(tmp_path / "halves.png")
    image = str(tmp_path / "halves.png")
    shown = run(video_page, image=image)
    assert status(video_page, shown) == "Done."
    (result,) = shown[video_page.drawn]
    video = imageio.imread(result.path).astype(int)
    assert video[0][:, :20, 0].mean() > 150 > video[0][:, 44:, 0].mean()
    assert len(read_parameters(result.path)["image_sha256"]) == 64
    shown = run(video_page, image=image, max_latent_length=1)
    assert "ask for a longer video" in status(video_page, shown)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0", "is not a picture in a known format"),
        ("a.png", b"", "is not a picture in a known format"),
        ("a.svg", b"<svg/>", "is not a picture in a known format"),
        ("cut.jpg", (ROOT / "assets/sample_image.jpg").read_bytes()[:9999], "cannot be decoded"),
    ],
)
def test_damaged_uploads_are_taken_back_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    image, note = check_upload(str(tmp_path / name))
    assert image is None
    assert f"This file cannot be used: it {reason}" in note and str(tmp_path) not in note


def test_sound_uploads_stay():
    image, note = check_upload(str(ROOT / "assets" / "sample_image.jpg"))
    assert image == gr.skip() and "wrong" not in note


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((90, 40), (25, 0, 65, 40)),  # wide: the middle square
        ((40, 91), (0, 25, 40, 65)),  # high: floor of (91 - 40) / 2
        ((40, 40), (0, 0, 40, 40)),
    ],
)
def test_pictures_are_cropped_in_the_middle(size, box):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    cropped = crop_image(Image.fromarray(array), 40, 40)
    assert np.array_equal(cropped, array[box[1] : box[3], box[0] : box[2]])


def test_cropping_scales_to_the_target():
    wide = Image.linear_gradient("L").resize((300, 100))
    assert crop_image(wide, 48, 76).shape == (48, 76, 3)
    assert crop_image(Image.new("RGB", (1, 500)), 48, 76).shape == (48, 76, 3)
    assert crop_image(Image.new("RGB", (500, 1)), 76, 48).shape == (76, 48, 3)


def test_cropping_turns_pictures_upright():
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255  # white is left
    picture = Image.fromarray(array)
    picture.getexif()[ExifTags.Base.Orientation] = 6  # turned clockwise, white is on top
    upright = crop_image(picture, 40, 20)
    assert upright[:18].min() > 250 and upright[22:].max() < 5


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_cropping_makes_rgb_of_other_colours(mode):
    grey = Image.new("L", (50, 30), 255)
    picture = Image.new(mode, (50, 30), 65535) if mode == "I;16" else grey.convert(mode)
    cropped = crop_image(picture, 30, 30)
    assert cropped.shape == (30, 30, 3) and cropped.dtype == np.uint8 and cropped.min() > 250


def test_cropping_lays_transparency_on_white():
    assert crop_image(Image.new("RGBA", (50, 30), (0, 0, 0, 0)), 30, 30).min() == 255


# --- defaults ---------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
inference:
  parameters:
    guidance_scale: 3.5
    num_diffusion_steps: 51
    negative_prompt: ""
    temperature: 1
widget:
  - text: a small ring
  - src: picture.png
---
# A model
"""
FALLBACK = Defaults(
    guidance_scale=5,
    num_inference_steps=64,
    num_diffusion_steps=25,
    negative_prompt="ugly",
    examples=("a cat",),
)


def write_card(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def test_defaults_follow_the_models_card(tmp_path, caplog):
    defaults = read_defaults(write_card(tmp_path, CARD), FALLBACK, Ranges())
    assert defaults == Defaults(
        guidance_scale=3.5,
        num_inference_steps=64,
        num_diffusion_steps=25,
        negative_prompt="",
        examples=("a small ring",),
    )
    assert "num_diffusion_steps is 51, not 1 to 50" in caplog.text


@pytest.mark.parametrize("value", ["4.0", "true", "'4'", ".nan", "0", "[4]"])
def test_a_recommended_count_is_a_whole_number_in_range(tmp_path, caplog, value):
    card = f"---\ninference: {{parameters: {{num_inference_steps: {value}}}}}\n---\n"
    assert read_defaults(write_card(tmp_path, card), FALLBACK, Ranges()) == FALLBACK
    assert "README.md: num_inference_steps is " in caplog.text


@pytest.mark.parametrize(
    "text",
    ["# no header", "---\ninference: false\nwidget: none\n---\n", "---\nlicense: mit\n---\n"],
)
def test_without_recommendations_the_released_models_defaults_hold(tmp_path, text):
    assert read_defaults(write_card(tmp_path, text), FALLBACK, Ranges()) == FALLBACK
    assert read_defaults(write_card(tmp_path / "a", ""), FALLBACK, Ranges()) == FALLBACK


def test_a_checkpoint_takes_the_card_of_its_base_folder(tmp_path):
    from diffnext.pipelines.release_folder import write_base_reference

    write_card(tmp_path / "base", CARD)
    (tmp_path / "checkpoint").mkdir()
    write_base_reference(tmp_path / "checkpoint", tmp_path / "base", {})
    defaults = read_defaults(tmp_path / "checkpoint", FALLBACK, Ranges())
    assert defaults.guidance_scale == 3.5


@pytest.mark.parametrize(
    "header",
    [
        "a: [",
        "- a",
        "? [a]\n: b",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: " + "[" * 2000,
        "a: &a [b]\nc: [*a, *a]",  # again and again, it would be longer than any memory
        "a: &a [*a]",
    ],
)
def test_a_broken_header_is_told_in_one_line(tmp_path, header):
    with pytest.raises(ValueError, match="README.md cannot be read: .") as caught:
        read_defaults(write_card(tmp_path, f"---\n{header}\n---\n"), FALLBACK, Ranges())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "header", ["1: 2", "self: 1", "tags: 5", "model-index: a", "eval_results: 5", "~: ~", ""]
)
def test_other_parts_of_a_header_may_hold_anything(tmp_path, header):
    card = f"---\n{header}\ninference: {{parameters: {{guidance_scale: 2}}}}\n---\n"
    assert read_defaults(write_card(tmp_path, card), FALLBACK, Ranges()).guidance_scale == 2


def test_nova_tiny_says_how_it_draws_best():
    defaults = read_defaults(NOVA_TINY, PicturePage.DEFAULTS, PicturePage.RANGES)
    assert (defaults.guidance_scale, defaults.num_inference_steps) == (2.5, 16)
    assert defaults.num_diffusion_steps == 25 and defaults.negative_prompt == ""
    assert defaults.examples[0] == "a red star"


@pytest.mark.parametrize(
    ("name", "numbers", "has_negative", "examples"),
    [("page", (5, 64, 25), True, 9), ("video_page", (7, 128, 100), False, 5)],
)
def test_pages_open_with_the_values_of_released_models(
    name, numbers, has_negative, examples, request
):
    page = request.getfixturevalue(name)
    values = {key: component.value for key, component in page.inputs.items()}
    assert tuple(values[key] for key in QUICK) == numbers
    assert bool(values["negative_prompt"]) == has_negative
    assert len(page.defaults.examples) == examples
    assert values["prompt"] == page.defaults.examples[0]
    assert values["seed"] == 0 and values["randomize_seed"] is True


def test_each_number_is_explained(page, video_page):
    for one in (page, video_page):
        for name, component in one.inputs.items():
            is_explained = name in ("prompt", "randomize_seed", "image") or component.info
            assert is_explained, name


# --- command lines ----------------------------------------------------------------------------


def image_command(words):
    return app.main(["image", *words])


@pytest.mark.parametrize(
    ("main", "model"),
    [
        (app_nova_t2i.main, ["--model", str(NOVA_TINY)]),
        (app_nova_t2v.main, ["--model", str(NOVA_TINY)]),
        (image_command, [str(NOVA_TINY)]),
    ],
)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "float8"], "invalid choice: 'float8'"),
        (["--device", "-1"], "--device must be at least 0, got -1"),
        (["--device", "cuda"], "invalid int value: 'cuda'"),
        (["--port", "70000"], "--port must be 1 to 65535, got 70000"),
    ],
)
def test_wrong_arguments_end_with_two(main, model, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*model, *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_is_needed(capsys):
    for main, words in ((app.main, ["video"]), (app_nova_t2i.main, ["--model", ""])):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert re.search("model is needed|required: model", capsys.readouterr().err)


def test_a_missing_model_ends_with_one(tmp_path, capsys):
    for main, words in ((app.main, ["video"]), (app_nova_t2i.main, ["--model"])):
        assert main([*words, str(tmp_path / "none")]) == 1
        assert "none, and this is not a Hub id" in capsys.readouterr().err


def test_a_model_of_pictures_makes_no_videos(capsys):
    assert app.main(["video", str(NOVA_TINY)]) == 1
    assert "this model draws pictures, not videos" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert app.main(["image", str(NOVA_TINY), "--device", "99"]) == 1
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.main(["image", str(NOVA_TINY)]) == 1
    assert 'pip install "gradio' in capsys.readouterr().err


def test_mistakes_are_told_before_torch_is_loaded():
    code = "import sys, app_nova_t2i, app_nova_t2v; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT / "scripts").returncode == 0


def test_parameters_are_shown(page, tmp_path, capsys):
    path = str(draw(page)[0].path)
    assert show_parameters.main([path]) == 0
    assert '"prompt": "a red star"' in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert show_parameters.main([str(tmp_path / "plain.png"), path]) == 1
    shown = capsys.readouterr()
    assert "carries no parameters" in shown.err and '"prompt": "a red star"' in shown.out
