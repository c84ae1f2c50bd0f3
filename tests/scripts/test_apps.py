"""What the apps do behind their pages; the pages themselves are in test_apps_browser.py."""

# ruff: noqa: E402 - without gradio, the apps cannot be imported

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

gr = pytest.importorskip("gradio", reason="the apps need `pip install .[demo]`")

import app_nova_t2i
import app_nova_t2v
import show_parameters
from apps import image_app, options, video_app
from apps.loading import choose_device, load_pipeline, model_name
from apps.studio import MAX_SEED, DrawRequest, Stopped, Studio, choose_seed
from diffnext.cli import init
from diffnext.pipelines.model_card import Defaults, Ranges, read_defaults
from diffnext.utils import read_parameters

ROOT = Path(__file__).resolve().parents[2]
NOVA_TINY = ROOT / "assets" / "nova-tiny"
QUICK = {"guidance_scale": 2.5, "num_inference_steps": 4, "num_diffusion_steps": 5}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(NOVA_TINY, 0, "float32")


@pytest.fixture
def app(pipe, tmp_path):
    studio = Studio(pipe, "nova-tiny", tmp_path / "results")
    return image_app.ImageApp(studio, image_app.DEFAULTS)


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-video"
    config = ROOT / "configs" / "nova_shapes_t2v.yaml"
    assert init.main(["--config", str(config), "--output", str(folder), "--tiny"]) == 0
    return folder


@pytest.fixture(scope="module")
def video_pipe(video_model):
    return load_pipeline(video_model, 0, "float32")


@pytest.fixture
def video(video_pipe, tmp_path):
    studio = Studio(video_pipe, "random-video", tmp_path / "results")
    return video_app.VideoApp(studio, video_app.DEFAULTS)


def draw(app, prompt="a red star", negative_prompt="", seed=7, randomize_seed=False, **options):
    return app.generate_image4(prompt, negative_prompt, seed, randomize_seed, **QUICK | options)


def film(video, image=None, preset="17x64x64", **options):
    return video.generate_video("a ring", "", image, 5, preset, 7, False, **QUICK | options)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# --- pictures -------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_pictures(app):
    first, again, other = draw(app), draw(app), draw(app, seed=99)
    assert len(first) == 5 and first[4] == 7
    for index in range(4):
        assert np.array_equal(pixels(first[index]), pixels(again[index]))
        assert first[index] != again[index]
        assert not np.array_equal(pixels(first[index]), pixels(other[index]))


def test_a_picture_is_drawn_again_from_its_own_parameters(app, pipe):
    path = draw(app, negative_prompt="a blue ring")[2]
    parameters = read_parameters(path)
    assert parameters["seed"] == 9
    assert parameters["model"] == "nova-tiny" and parameters["precision"] == "float32"
    alone = draw(
        app,
        parameters["prompt"],
        parameters["negative_prompt"],
        parameters["seed"],
        **{name: parameters[name] for name in QUICK},
    )[0]
    # Alone or beside others, sums are rounded differently, and WebP is lossy.
    difference = np.abs(pixels(path).astype(int) - pixels(alone).astype(int))
    assert difference.max() <= 8 and difference.mean() < 0.5


def test_seeds_begin_anew_after_the_last(app):
    paths = draw(app, seed=MAX_SEED)[:4]
    assert [read_parameters(path)["seed"] for path in paths] == [MAX_SEED, 0, 1, 2]


def test_a_random_seed_is_told(app):
    results = [draw(app, randomize_seed=True) for _ in range(2)]
    assert results[0][4] != results[1][4]
    for result in results:
        assert 0 <= result[4] <= MAX_SEED
        assert read_parameters(result[0])["seed"] == result[4]


def test_guidance_of_one_and_a_negative_prompt_work(app):
    plain = draw(app, guidance_scale=1)
    assert np.array_equal(
        pixels(plain[0]), pixels(draw(app, guidance_scale=1, negative_prompt="x")[0])
    )
    guided = draw(app, negative_prompt="a blue square")
    assert not np.array_equal(pixels(guided[0]), pixels(draw(app)[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "x" * 2001}, "at most 2000 characters, got 2001"),
        ({"negative_prompt": "x" * 2001}, "negative prompt must have at most 2000"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
    ],
)
def test_wrong_requests_are_explained(app, options, message):
    with pytest.raises(gr.Error, match=message):
        draw(app, **options)


def test_a_model_of_videos_draws_their_first_frame(video_pipe, tmp_path):
    studio = Studio(video_pipe, "random-video", tmp_path)
    paths = draw(image_app.ImageApp(studio, image_app.DEFAULTS))[:4]
    assert all(pixels(path).shape == (64, 64, 3) for path in paths)


# --- one at a time, and stopping --------------------------------------------------------------


def make_request(**options):
    return DrawRequest(prompt="a ring", negative_prompt="", **{**QUICK, **options})


def test_a_visitor_stops_a_drawing(pipe, tmp_path):
    studio = Studio(pipe, "nova-tiny", tmp_path)
    done = []

    def report(step, total, text):
        done.append((step, total))
        studio.stop("others have no say")
        if step == 2:
            studio.stop("visitor")

    with pytest.raises(Stopped):
        studio.draw("visitor", make_request(), [0], report)
    assert done == [(1, 4), (2, 4)]
    done.clear()
    studio.stop("visitor")  # nothing is in progress, and nothing is remembered
    assert studio.draw("another", make_request(), [0], report).shape == (1, 64, 64, 3)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_stopped_page_keeps_what_it_shows(app):
    def stop(done, desc, unit):
        app.studio.stop("local")

    assert draw(app, progress=stop) == [gr.skip()] * 5
    assert not app.studio.output_dir.exists()


def test_a_drawing_waits_for_the_one_in_progress(pipe, tmp_path):
    studio = Studio(pipe, "nova-tiny", tmp_path)
    events = []
    second = threading.Thread(
        target=lambda: studio.draw("b", make_request(), [1], lambda *_: events.append("b"))
    )

    def report(step, total, text):
        if step == 1:
            second.start()
        events.append("a")

    studio.draw("a", make_request(), [0], report)
    second.join(60)
    assert events == ["a"] * 4 + ["b"] * 4


def test_closing_stops_and_waits_for_the_drawing_in_progress(pipe, tmp_path):
    studio = Studio(pipe, "nova-tiny", tmp_path)
    is_begun, ends = threading.Event(), []

    def draw_long():
        with pytest.raises(Stopped):
            request = make_request(num_inference_steps=16, num_diffusion_steps=50)
            studio.draw("a", request, [0], lambda *_: is_begun.set())
        ends.append("drawing")

    drawing = threading.Thread(target=draw_long)
    drawing.start()
    assert is_begun.wait(60)
    studio.close()
    drawing.join(60)
    assert ends == ["drawing"]


def test_progress_counts_sets_that_hold_tokens(pipe, video_pipe, tmp_path):
    for one, frames, expected in ((pipe, 1, 13), (video_pipe, 5, 5 * 13)):
        seen = []
        request = make_request(
            num_inference_steps=16, num_diffusion_steps=1, max_latent_length=frames
        )
        Studio(one, "", tmp_path).draw("a", request, [0], lambda *now, seen=seen: seen.append(now))
        assert [step for step, *_ in seen] == list(range(1, expected + 1))
        assert {total for _, total, _ in seen} == {expected}


# --- videos -----------------------------------------------------------------------------------


def test_presets_are_what_the_model_makes(video, video_pipe):
    assert video.presets == {"17x64x64": 5, "1x64x64": 1}
    height, width = 480, 768
    video_pipe.transformer.register_to_config(video_base_size=[16, 15, 24])
    try:
        presets = video_app.make_presets(video_pipe, height, width)
    finally:
        video_pipe.transformer.register_to_config(video_base_size=[5, 2, 2])
    assert presets == {"33x768x480": 9, "17x768x480": 5, "1x768x480": 1}


def test_a_model_of_pictures_makes_no_videos(app):
    with pytest.raises(ValueError, match="draws pictures, not videos"):
        video_app.VideoApp(app.studio, video_app.DEFAULTS)


def test_videos_repeat_and_carry_their_parameters(video):
    first, again = film(video), film(video)
    assert Path(first[0]).read_bytes() == Path(again[0]).read_bytes()
    parameters = read_parameters(first[0])
    assert parameters["max_latent_length"] == 5 and parameters["motion_flow"] == 5
    assert parameters["prompt"] == "a ring" and parameters["seed"] == 7
    assert "image_sha256" not in parameters


def test_one_latent_frame_is_a_video_of_one_frame(video):
    import imageio.v3 as imageio

    assert len(imageio.imread(film(video, preset="1x64x64")[0])) == 1


def test_a_video_begins_with_its_picture(video, tmp_path):
    import imageio.v3 as imageio

    halves = np.zeros((32, 96, 4), np.uint8)
    halves[..., 3] = 255
    halves[:, :48] = (255, 0, 0, 255)
    Image.fromarray(halves, "RGBA").save(tmp_path / "halves.png")
    path = film(video, str(tmp_path / "halves.png"))[0]
    first = imageio.imread(path)[0].astype(int)
    assert first[:, :20, 0].mean() > 150 > first[:, 44:, 0].mean()
    assert len(read_parameters(path)["image_sha256"]) == 64


def test_an_upload_that_is_not_a_picture_is_refused_without_its_path(video, tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(gr.Error, match="^'the image prompt: is not a picture in a known format'$"):
        film(video, str(tmp_path / "a.png"))


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
    cropped = video_app.crop_image(Image.fromarray(array), 40, 40)
    assert np.array_equal(cropped, array[box[1] : box[3], box[0] : box[2]])


def test_cropping_scales_to_the_target():
    wide = Image.linear_gradient("L").resize((300, 100))
    assert video_app.crop_image(wide, 48, 76).shape == (48, 76, 3)
    assert video_app.crop_image(Image.new("RGB", (1, 500)), 48, 76).shape == (48, 76, 3)
    assert video_app.crop_image(Image.new("RGB", (500, 1)), 76, 48).shape == (76, 48, 3)


def test_cropping_turns_pictures_upright():
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255  # white is left
    picture = Image.fromarray(array)
    picture.getexif()[ExifTags.Base.Orientation] = 6  # turned clockwise, white is on top
    upright = video_app.crop_image(picture, 40, 20)
    assert upright[:18].min() > 250 and upright[22:].max() < 5


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_cropping_makes_rgb_of_other_colours(mode):
    grey = Image.new("L", (50, 30), 255)
    picture = Image.new(mode, (50, 30), 65535) if mode == "I;16" else grey.convert(mode)
    cropped = video_app.crop_image(picture, 30, 30)
    assert cropped.shape == (30, 30, 3) and cropped.dtype == np.uint8 and cropped.min() > 250


def test_cropping_lays_transparency_on_white():
    assert video_app.crop_image(Image.new("RGBA", (50, 30), (0, 0, 0, 0)), 30, 30).min() == 255


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


def test_a_broken_header_is_told(tmp_path):
    with pytest.raises(ValueError, match="README.md cannot be read"):
        read_defaults(write_card(tmp_path, "---\na: [\n---\n"), FALLBACK, Ranges())


def test_nova_tiny_says_how_it_draws_best():
    defaults = read_defaults(NOVA_TINY, image_app.DEFAULTS, image_app.RANGES)
    assert (defaults.guidance_scale, defaults.num_inference_steps) == (2.5, 16)
    assert defaults.num_diffusion_steps == 25 and defaults.negative_prompt == ""
    assert defaults.examples[0] == "a red star"


def test_released_models_open_with_their_own_defaults():
    image, video = image_app.DEFAULTS, video_app.DEFAULTS
    assert (image.guidance_scale, image.num_inference_steps, image.num_diffusion_steps) == (
        5,
        64,
        25,
    )
    assert (video.guidance_scale, video.num_inference_steps, video.num_diffusion_steps) == (
        7,
        128,
        100,
    )
    assert image.negative_prompt and not video.negative_prompt
    assert len(image.examples) == 9 and len(video.examples) == 5


def test_pages_show_their_defaults(app, video, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for one, defaults in ((app, image_app.DEFAULTS), (video, video_app.DEFAULTS)):
        blocks = one.build_page().blocks.values()
        values = {getattr(block, "label", None): getattr(block, "value", None) for block in blocks}
        assert values["Guidance scale"] == defaults.guidance_scale
        assert values["Inference steps"] == defaults.num_inference_steps
        assert values["Diffusion steps"] == defaults.num_diffusion_steps
        assert values["Negative Prompt"] == defaults.negative_prompt
        assert values["Seed"] == 0 and values["Randomize seed"] is True


# --- command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [app_nova_t2i, app_nova_t2v])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "float8"], "invalid choice: 'float8'"),
        (["--device", "-1"], "--device must be 0 or more, got -1"),
        (["--device", "cuda"], "invalid int value: 'cuda'"),
        (["--port", "70000"], "--port must be 1 to 65535, got 70000"),
        (["--model", ""], "--model is needed"),
    ],
)
def test_wrong_arguments_end_with_two(script, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--model", str(NOVA_TINY), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_was_not_shipped_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        options.parse_args([], "", tmp_path / "nova-tiny-video")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--model is needed" in error and "there is no assets/nova-tiny-video" in error
    assert options.parse_args([], "", NOVA_TINY).model == str(NOVA_TINY)


@pytest.mark.parametrize("script", [app_nova_t2i, app_nova_t2v])
def test_a_missing_model_ends_with_one(script, tmp_path, capsys):
    assert script.main(["--model", str(tmp_path / "none")]) == 1
    assert "none, and this is not a Hub id" in capsys.readouterr().err


def test_the_video_app_refuses_a_model_of_pictures(capsys):
    assert app_nova_t2v.main(["--model", str(NOVA_TINY)]) == 1
    assert "draws pictures, not videos" in capsys.readouterr().err


def test_mistakes_are_told_before_torch_is_loaded():
    code = "import sys, app_nova_t2i, app_nova_t2v; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT / "scripts").returncode == 0


def test_on_a_cpu_weights_are_float32(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert str(load_pipeline(NOVA_TINY, 3, None).dtype) == "torch.float32"
    assert str(load_pipeline(NOVA_TINY, 0, "bfloat16").dtype) == "torch.bfloat16"


def test_devices_are_numbered(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(choose_device(1)) == "cuda:1"
    with pytest.raises(ValueError, match="--device 2: there are 2 GPUs"):
        choose_device(2)


def test_files_do_not_tell_where_the_model_is(tmp_path):
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    assert model_name(str(tmp_path / "secret" / "my-model")) == "my-model"
    assert model_name("BAAI/nova-d48w1024-osp480") == "BAAI/nova-d48w1024-osp480"


def test_seeds_are_the_visitors_or_by_lot():
    assert choose_seed(7.0, False) == 7
    assert len({choose_seed(7, True) for _ in range(5)}) > 1


def test_parameters_are_shown(app, tmp_path, capsys):
    path = draw(app)[0]
    assert show_parameters.main([path]) == 0
    assert '"prompt": "a red star"' in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert show_parameters.main([str(tmp_path / "plain.png"), path]) == 1
    shown = capsys.readouterr()
    assert "carries no parameters" in shown.err and '"prompt": "a red star"' in shown.out
