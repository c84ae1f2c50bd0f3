"""The pretrained model at a new user's hands."""

import draw_shapes
import imageio.v3 as imageio
import numpy as np
from PIL import Image
from shapes_world.detection import detect

ZOOM = draw_shapes.ZOOM
ASKED = [("red", "square"), ("blue", "cross"), ("green", "ring"), ("pink", "circle")]


def test_what_was_asked_for_is_drawn(tmp_path, capsys):
    prompts = [f"a {color} {shape}" for color, shape in ASKED] * 2
    assert draw_shapes.main([*prompts, "--no-clip", "--output", str(tmp_path)]) == 0
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


def test_a_clip_is_shown_as_a_strip_and_moves(tmp_path, capsys):
    options = ["a ring", "--clip", "a red circle moving left", "--output", str(tmp_path)]
    assert draw_shapes.main(options) == 0
    frames = imageio.imread(tmp_path / "clip.gif")
    assert frames.shape == (17, 64, 64, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1
    assert Image.open(tmp_path / "clip.png").width == 5 * (64 * ZOOM + 8) + 8
    assert "17 frames" in capsys.readouterr().out


def test_a_missing_model_is_named(tmp_path, capsys):
    assert draw_shapes.main(["--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
