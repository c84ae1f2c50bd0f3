"""The pretrained model at a new user's hands."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

import draw_shapes
from diffnext.cli import init
from shapes_world.detection import detect

ROOT = Path(__file__).resolve().parents[3]
ZOOM = draw_shapes.ZOOM
ASKED = [("red", "square"), ("blue", "cross"), ("green", "ring"), ("pink", "circle")]


def test_what_was_asked_for_is_drawn(tmp_path, capsys):
    prompts = [f"a {color} {shape}" for color, shape in ASKED] * 2
    assert draw_shapes.main([*prompts, "--output", str(tmp_path)]) == 0
    sheet = Image.open(tmp_path / "shapes.png").convert("RGB")
    side = 64 * ZOOM
    num_right = 0
    for column, asked in enumerate(ASKED * 2):
        left = 8 + column * (side + 8)
        picture = sheet.crop((left, 8, left + side, 8 + side)).resize((64, 64))
        items = detect(np.asarray(picture)).items
        num_right += [(item.color, item.shape) for item in items] == [asked]
    assert num_right >= 4  # of 8, chance being one in 48: no two machines round alike
    assert "8 prompts" in capsys.readouterr().out


def test_a_clip_is_shown_as_a_strip(tmp_path, capsys):
    config, model = ROOT / "configs" / "nova_shapes_t2v.yaml", tmp_path / "model"
    init.main(["--config", str(config), "--output", str(model), "--tiny"])
    options = ["a ring", "--clip", "a red circle moving left", "--clip-model", str(model)]
    assert draw_shapes.main([*options, "--output", str(tmp_path)]) == 0
    frames = imageio.imread(tmp_path / "clip.gif")
    assert frames.shape[0] == 17 and frames.shape[-1] == 3
    assert Image.open(tmp_path / "clip.png").width == 5 * (frames.shape[2] * ZOOM + 8) + 8
    assert "17 frames" in capsys.readouterr().out


def test_without_prompts_the_models_show_what_they_can(tmp_path, capsys):
    assert draw_shapes.main(["--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"shapes.png", "clip.gif", "clip.png"}
    printed = capsys.readouterr().out
    assert "4 prompts" in printed and "17 frames" in printed


def test_a_missing_model_is_named(tmp_path, capsys):
    assert draw_shapes.main(["--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
