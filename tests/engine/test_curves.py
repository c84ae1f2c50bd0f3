"""The metrics file, and the picture made of it."""

import json

import pytest
from PIL import Image

from diffnext.engine.curves import draw_curves, read_metrics, truncate_metrics


def write(file, rows, rest=""):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)


def rows(count=100):
    values = {"loss": 1.0, "lr": 1e-4, "grad_norm": 2.0, "samples_per_s": 3.0}
    return [{"step": step, **values, "loss": 1 / (step + 1)} for step in range(count)]


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "lo', "[3]\n", '{"loss": 1}\n', '{"step": "3"}\n', "3\n"]
)
def test_line_that_is_no_report_is_left_out(tmp_path, rest):
    file = tmp_path / "metrics.jsonl"
    write(file, rows(3), rest)
    assert read_metrics(file) == rows(3)


def test_steps_to_be_done_again_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, [*rows(5), {"step": 4, "validation/loss": 0.5}], '{"st')
    truncate_metrics(file, 4)
    assert read_metrics(file) == rows(4)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_picture_shows_the_losses(tmp_path):
    file = tmp_path / "metrics.jsonl"
    picture = tmp_path / "curves.png"
    write(file, [{"step": 0, "lr": 1e-4}])
    draw_curves(file, picture)
    empty = Image.open(picture).convert("RGB")
    write(file, [*rows(), {"step": 50, "validation/loss": 0.5}])
    draw_curves(file, picture)
    full = Image.open(picture).convert("RGB")
    assert full.size[0] >= 800
    assert len(set(full.get_flattened_data())) > len(set(empty.get_flattened_data()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
