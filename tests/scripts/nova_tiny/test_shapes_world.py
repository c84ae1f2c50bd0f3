"""The world of shapes: what is drawn, what it is called, and what the detector finds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import evaluate_shapes
import make_shapes_dataset
from diffnext.cli import evaluate, init
from diffnext.cli import main as cli
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.models.autoencoders.loading import load_autoencoder
from diffnext.pipelines import NOVAPipeline
from shapes_world.binding import measure_binding
from shapes_world.captions import write_caption, write_prompt
from shapes_world.detection import detect
from shapes_world.evaluation import (
    enumerate_descriptions,
    judge,
    name_motion,
    select_descriptions,
)
from shapes_world.rendering import coverage, places, render_clip, render_scene
from shapes_world.scenes import (
    CATEGORIES,
    CLIP_CATEGORIES,
    COLORS,
    HELD_OUT_COLORINGS,
    HELD_OUT_PAIRS,
    MIXED_SHAPES,
    MORE_SHAPES,
    SHAPES,
    Description,
    Item,
    Mention,
    Scene,
    draw_clip,
    draw_clip_description,
    draw_description,
    draw_scene,
)

ASSETS = Path(__file__).parents[3] / "assets"
VAE_FOLDERS = {"image": ASSETS / "nova-tiny" / "vae", "video": ASSETS / "nova-tiny-video" / "vae"}


def draw_scenes(number, category, known_shapes=SHAPES):
    rng = np.random.default_rng(1)
    descriptions = [draw_description(rng, category, known_shapes) for _ in range(number)]
    return [(d, draw_scene(rng, d)) for d in descriptions]


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_detector_agrees_with_what_was_rendered(category):
    scenes = draw_scenes(120, category)
    found = [detect(render_scene(scene)) for _, scene in scenes]
    right = [d.fulfilled_by(f.items) for (d, _), f in zip(scenes, found, strict=True)]
    assert np.mean(right) >= 0.99
    assert [f.background for f in found] == [scene.background for _, scene in scenes]


@pytest.mark.parametrize("category", ["two", "attribution"])
def test_what_is_named_first_comes_first_as_one_reads(category):
    for description, scene in draw_scenes(60, category):
        first, second = scene.items
        assert (first.shape, second.shape) == tuple(m.shape for m in description.mentions)
        assert first.center[::-1] < second.center[::-1]


def test_the_detector_rejects_captions_of_other_pictures():
    scenes = [pair for category in CATEGORIES for pair in draw_scenes(30, category)]
    found = [detect(render_scene(scene)) for _, scene in scenes]
    shifted = [*found[37:], *found[:37]]
    right = [d.fulfilled_by(f.items) for (d, _), f in zip(scenes, shifted, strict=True)]
    assert np.mean(right) < 0.05


def test_places_and_sizes_are_found():
    item = Item("triangle", "blue", 0.2, (0.3, 0.6))
    (found,) = detect(render_scene(Scene("white", (item,)))).items
    assert found.center == pytest.approx(item.center, abs=0.02)
    assert found.radius == pytest.approx(item.radius, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_every_color_on_every_size_of_picture(shape):
    for color in COLORS:
        scene = Scene("gray", (Item(shape, color, 0.2, (0.5, 0.5)),))
        for size in (64, 128):
            (found,) = detect(render_scene(scene, size)).items
            assert (found.shape, found.color) == (shape, color)


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_more_shapes_stay_in_their_circle_and_have_their_colors(shape):
    for color in COLORS:
        scene = Scene("gray", (Item(shape, color, 0.3, (0.5, 0.5)),))
        (found,) = detect(render_scene(scene)).items
        assert found.color == color
    cover = coverage(scene.items[0], 64)
    x, y = places(64)
    assert not cover[np.hypot(x - 0.5, y - 0.5) > 0.34].any()
    assert 0.06 < cover.mean() < 0.2


def test_more_shapes_are_half_of_all():
    shapes = [scene.items[0].shape for _, scene in draw_scenes(400, "single", MIXED_SHAPES)]
    assert 0.45 < np.mean([shape in MORE_SHAPES for shape in shapes]) < 0.55
    assert set(shapes) == {*SHAPES, *MORE_SHAPES}


def test_an_empty_picture_has_no_shapes():
    assert detect(render_scene(Scene("navy", ()))).items == ()


def test_descriptions_are_exact():
    star = Item("star", "blue", 0.1, (0.3, 0.5))
    ring = Item("ring", "red", 0.1, (0.7, 0.5))
    pair = Description((Mention("star"), Mention("ring", "red")))
    assert pair.fulfilled_by([star, ring])
    assert pair.fulfilled_by([ring, star])
    assert replace(pair, relation="left of").fulfilled_by([ring, star])
    assert not replace(pair, relation="right of").fulfilled_by([star, ring])
    assert not replace(pair, relation="above").fulfilled_by([star, ring])
    assert not pair.fulfilled_by([star])
    assert not pair.fulfilled_by([star, ring, ring])
    assert not pair.fulfilled_by([star, star])
    assert not pair.fulfilled_by([star, replace(ring, color="green")])
    three = Description((Mention("star"),), count=3)
    assert three.fulfilled_by([star] * 3)
    assert not three.fulfilled_by([star] * 2)
    assert not three.fulfilled_by([star, star, ring])


def test_a_fifth_of_the_combinations_is_held_out():
    assert 5 * len(HELD_OUT_COLORINGS) >= len(COLORS) * len(SHAPES)
    assert 5 * len(HELD_OUT_PAIRS) >= len(SHAPES) * (len(SHAPES) - 1)
    for category in CATEGORIES[1:]:
        assert all(d.is_held_out for d in select_descriptions(category, True, 20, seed=0))
        assert not any(d.is_held_out for d in select_descriptions(category, False, 20, seed=0))


@pytest.mark.parametrize("known_shapes", [SHAPES, MIXED_SHAPES])
@pytest.mark.parametrize("category", CATEGORIES)
def test_training_never_shows_what_is_held_out(category, known_shapes):
    for description, scene in draw_scenes(300, category, known_shapes):
        assert not description.is_held_out
        assert not {(item.color, item.shape) for item in scene.items} & HELD_OUT_COLORINGS
        assert description.fulfilled_by(scene.items)


def test_captions_say_what_descriptions_demand():
    rng = np.random.default_rng(0)
    pair = Description((Mention("star", "orange"), Mention("ring")), relation="above")
    assert write_prompt(pair) == "an orange star above a ring"
    crosses = Description((Mention("cross", "red"),), count=3, background="navy")
    assert write_prompt(crosses) == "three red crosses"
    captions = {write_caption(rng, crosses) for _ in range(60)}
    assert len(captions) > 10
    assert all("navy" in text and "red crosses" in text and text[-1] == "." for text in captions)
    moving = Description((Mention("star"), Mention("ring")), motion="moving left")
    assert write_prompt(moving) == "a star moving left and a ring"


@pytest.mark.parametrize("category", CLIP_CATEGORIES)
def test_clips_show_their_motion(category):
    rng = np.random.default_rng(2)
    for _ in range(6):
        description = draw_clip_description(rng, category)
        clip = draw_clip(rng, description, strength=1)
        assert judge(description, render_clip(clip)).is_right
        assert clip.flow == 5  # what models assume when nobody says


def test_what_stands_still_or_moves_otherwise_is_not_right():
    description = Description((Mention("star"),), motion="moving left")
    still = render_scene(Scene("black", (Item("star", "red", 0.2, (0.6, 0.5)),)))
    verdict = judge(description, [still] * 5)
    assert verdict.content and verdict.identity and not verdict.motion
    assert verdict.agreement == 1
    rng = np.random.default_rng(0)
    other = render_clip(draw_clip(rng, replace(description, motion="moving up")))
    assert not judge(description, other).motion
    vanishing = judge(description, [*other[:8], *[np.zeros_like(still)] * 9])
    assert not vanishing.identity and vanishing.agreement == 8 / 17
    assert name_motion([]) is None


def test_a_longer_dataset_begins_with_the_shorter(tmp_path):
    for number in (3, 5):
        arguments = ["--output", str(tmp_path / str(number)), "--num", str(number)]
        vae = ["--vae", str(VAE_FOLDERS["image"]), "--batch-size", "2"]
        assert make_shapes_dataset.main([*arguments, *vae]) == 0
    loaders = [FeatureDataLoader(str(tmp_path / n), shuffle=False, batch_size=3) for n in "35"]
    first, second = (loader.next()[0] for loader in loaders)
    # Other batches are encoded by other kernels.
    np.testing.assert_allclose(first["latents"], second["latents"], atol=0.01)
    assert first["latents"].shape == (3, 8, 8, 8)
    assert first["prompt"] == second["prompt"]


def test_clips_are_written_with_their_flow(tmp_path):
    arguments = ["--output", str(tmp_path / "clips"), "--num", "2", "--clips", "--num-frames", "5"]
    assert make_shapes_dataset.main([*arguments, "--vae", str(VAE_FOLDERS["video"])]) == 0
    batch = FeatureDataLoader(str(tmp_path / "clips"), batch_size=2).next()[0]
    assert batch["latents"].shape == (2, 8, 2, 8, 8)
    assert all(flow in (5, 10) for flow in batch["motion_flow"])


def test_an_image_autoencoder_encodes_every_fourth_frame_of_clips(tmp_path):
    folder = VAE_FOLDERS["image"]
    arguments = ["--output", str(tmp_path / "clips"), "--num", "2", "--clips", "--vae", str(folder)]
    assert make_shapes_dataset.main(arguments) == 0
    batch = FeatureDataLoader(str(tmp_path / "clips"), batch_size=2, shuffle=False).next()[0]
    assert batch["latents"].shape == (2, 8, 5, 8, 8)
    parsed = make_shapes_dataset.parse_args(arguments)
    vae = load_autoencoder(folder)
    frames = np.stack([make_shapes_dataset.make_example(parsed, i).frames for i in range(2)])
    moments = torch.from_numpy(make_shapes_dataset.encode(vae, frames[:, 8:9])).float()
    wanted = DiagonalGaussianDistribution(moments)
    found = DiagonalGaussianDistribution(torch.from_numpy(batch["latents"][:, :, 2]).float())
    torch.testing.assert_close(found.mean, vae.scale_(wanted.mean), atol=0.02, rtol=0.01)
    scale = vae.config.scaling_factor
    torch.testing.assert_close(found.std, wanted.std * scale, atol=0.001, rtol=0.02)


def test_pictures_are_written_beside_their_captions(tmp_path):
    arguments = ["--output", str(tmp_path / "files"), "--num", "3", "--files"]
    assert make_shapes_dataset.main(arguments) == 0
    lines = (tmp_path / "files" / "captions.jsonl").read_text().splitlines()
    assert all((tmp_path / "files" / json.loads(line)["file"]).exists() for line in lines)
    assert len(lines) == 3


def test_a_folder_is_never_written_over(tmp_path, capsys):
    assert make_shapes_dataset.main(["--output", str(tmp_path), "--files"]) == 1
    assert "exists" in capsys.readouterr().err


def test_an_autoencoder_of_the_other_kind_is_refused(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "x"), "--vae", str(VAE_FOLDERS["video"])]
    assert make_shapes_dataset.main(arguments) == 1
    assert "is for clips: add --clips" in capsys.readouterr().err


def test_the_scorer_finds_rendered_pictures_right(tmp_path, capsys):
    arguments = ["--truth", "--num", "4", "--output", str(tmp_path)]
    assert evaluate_shapes.main(arguments) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["seen"]["overall"]["right"] == 1.0
    assert scores["held out"]["overall"]["right"] == 1.0
    assert (tmp_path / "sheet.png").exists()
    assert "| position | 1.00 (0.51 to 1.00) | 1.00 (0.51 to 1.00) |" in capsys.readouterr().out


def test_the_command_scores_shapes_in_a_clone_only(capsys, monkeypatch, tmp_path):
    words = ["evaluate", "shapes", "--truth", "--num", "1", "--categories", "single"]
    assert cli.main(words) == 0
    assert "| overall | 1.00" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "SHAPES", tmp_path / "scripts")
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "clone" in error


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(0, 10, 0, 0.278), (5, 10, 0.237, 0.763), (48, 48, 0.926, 1)],
)
def test_intervals_are_those_of_wilson(right, number, low, high):
    interval = evaluate_shapes.wilson_interval(right, number)
    assert interval == pytest.approx((low, high), abs=0.001)


def test_the_binding_share_tells_other_colors_from_right_ones():
    pipe = NOVAPipeline.from_pretrained(ASSETS / "nova-tiny", dtype=torch.float32)
    ratios = list(pipe.transformer.mask_embed.mask_ratios)
    binding = measure_binding(pipe, seed=0, number=64)
    assert set(binding) == {"all", "0.8"}
    for costs in binding.values():
        assert costs["other"] > 0.02 and costs["swapped"] < costs["other"]
        assert costs["share"] == costs["swapped"] / costs["other"]
    assert binding["0.8"]["right"] < binding["all"]["right"] / 2  # neighbours explain a lot
    assert binding == measure_binding(pipe, seed=0, number=64)
    assert pipe.transformer.mask_embed.mask_ratios == ratios


def test_the_scorer_measures_autoencoders(tmp_path):
    arguments = ["--vae", str(VAE_FOLDERS["image"]), "--num", "2", "--output", str(tmp_path)]
    assert evaluate_shapes.main(arguments) == 0
    assert 5 < json.loads((tmp_path / "scores.json").read_text())["settings"]["psnr"] < 60


@pytest.mark.parametrize("number", [1, 5])
def test_the_scorer_has_models_continue_clips(number, tmp_path):
    base = tmp_path / "base"
    config = ASSETS.parent / "configs" / "nova_clips_t2v.yaml"
    assert init.main(["--config", str(config), "--output", str(base), "--tiny"]) == 0
    arguments = ["--model", str(base), "--clips", "--given-frames", str(number), "--num", "2"]
    sizes = ["--num-frames", "9", "--num-inference-steps", "1", "--num-diffusion-steps", "1"]
    args = evaluate_shapes.parse_args([*arguments, *sizes, "--categories", "single"])
    draw = evaluate_shapes.pipeline_drawer(evaluate_shapes.load_pipeline(args), args)
    for drawing in evaluate_shapes.draw_all(args, draw):
        (mention,) = drawing.description.mentions
        background = np.median(drawing.frames[0], axis=(0, 1))
        assert drawing.frames.shape == (9, 64, 64, 3)
        assert mention.color is not None
        # Given frames come back through the autoencoder; what follows is noise.
        spread = [np.abs(frame - background).mean() for frame in drawing.frames.astype(float)]
        assert max(spread[:number]) < min(spread[number:])


def test_every_category_can_be_asked_for():
    for category in CATEGORIES:
        prompts = {write_prompt(d) for d in enumerate_descriptions(category)}
        assert len(prompts) == len(enumerate_descriptions(category))
