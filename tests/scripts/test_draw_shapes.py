"""The pretrained model at a new user's hands."""

import draw_shapes
import numpy as np
from PIL import Image
from shapes_world.detection import detect

ZOOM = draw_shapes.ZOOM


def test_what_was_asked_for_is_drawn(tmp_path, capsys):
    prompts = ["a red square", "a blue cross"]
    assert draw_shapes.main([*prompts, "--output", str(tmp_path)]) == 0
    sheet = Image.open(tmp_path / "shapes.png").convert("RGB")
    side = 64 * ZOOM
    for column, (color, shape) in enumerate((("red", "square"), ("blue", "cross"))):
        left = 8 + column * (side + 8)
        picture = sheet.crop((left, 8, left + side, 8 + side)).resize((64, 64))
        items = detect(np.asarray(picture)).items
        assert [(item.color, item.shape) for item in items] == [(color, shape)]
    assert "2 prompts" in capsys.readouterr().out


def test_a_missing_model_is_named(tmp_path, capsys):
    assert draw_shapes.main(["--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
