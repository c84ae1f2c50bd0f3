"""The recipe of the shipped models, shortened: one command, which may be stopped and run again."""

import json

import pytest

import make_nova_tiny
from diffnext.pipelines import NOVAPipeline


def folder_size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*"))


@pytest.mark.slow
def test_the_recipe_makes_scored_releases_and_runs_no_stage_twice(tmp_path, capfd):
    options = ["--work", str(tmp_path), "--scale", "0.0005", "--num-prompts", "1"]
    make_nova_tiny.main(options)
    pictures, clips = (NOVAPipeline.from_pretrained(tmp_path / p) for p in make_nova_tiny.PRODUCTS)
    assert pictures("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    options_of_clips = {"num_inference_steps": 2, "num_frames": 17, "output_type": "np"}
    assert clips("a red circle", **options_of_clips).frames.shape == (1, 17, 64, 64, 3)
    for product in make_nova_tiny.PRODUCTS:
        scores = json.loads((tmp_path / product / "scores.json").read_text())["scores"]
        assert set(scores["seen"]) >= {"single", "colors", "overall"}
        assert folder_size(tmp_path / product) < 8e6
    assert "motion" in scores["seen"]["single"]
    first = json.loads((tmp_path / "times.json").read_text())
    assert {name.removesuffix("_training") for name in first} >= {"text", "named_colors", "clips"}

    capfd.readouterr()
    make_nova_tiny.main(options)
    second = json.loads((tmp_path / "times.json").read_text())
    assert all("_scores" in name for name in first if second[name] != first[name])
    assert second.keys() == first.keys()
    assert "train.py" not in capfd.readouterr().out
