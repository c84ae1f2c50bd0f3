"""The recipe of assets/nova-tiny, shortened: one command, which may be stopped and run again."""

import json

import make_nova_tiny
import pytest

from diffnext.pipelines import NOVAPipeline

pytestmark = pytest.mark.slow


def test_the_recipe_makes_a_scored_release_and_runs_no_stage_twice(tmp_path, capfd):
    options = ["--work", str(tmp_path / "work"), "--scale", "0.0005", "--num-prompts", "1"]
    make_nova_tiny.main(options)
    work = tmp_path / "work"
    pipe = NOVAPipeline.from_pretrained(work / "nova-tiny")
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    scores = json.loads((work / "scores" / "scores.json").read_text())["scores"]
    assert set(scores["seen"]) >= {"single", "colors", "overall"}
    assert sum(f.stat().st_size for f in (work / "nova-tiny").rglob("*")) < 8e6
    first = json.loads((work / "times.json").read_text())
    assert set(first) == {
        *("autoencoder", "held_out_records", "base", "scores"),
        *("centered_records", "centered_training", "single_records", "single_training"),
        *("all_records", "all_training"),
    }

    capfd.readouterr()
    make_nova_tiny.main(options)
    second = json.loads((work / "times.json").read_text())
    assert {name for name in first if second[name] != first[name]} == {"scores"}
    assert "train.py" not in capfd.readouterr().out
