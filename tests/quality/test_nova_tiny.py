"""Quality of the shipped models, and faults that only quality can show.

Each fault is a line of the library that computes something else, with every shape and type right.
It is put into a copy of the package, on which the scorer then runs as a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "assets" / "nova-tiny"
CLIPS = ROOT / "assets" / "nova-tiny-video"
CATEGORIES = ("single", "colors")
TOLERANCE = 0.1  # 48 pictures of a share of 0.9: a standard error of 0.04
CLIP_TOLERANCE = 0.2  # 36 clips of a share of 0.6: a standard error of 0.08

# Name: (file, a line of it as it is, as the fault has it)
FAULTS = {
    "guidance leads away from the prompt": (
        "models/guidance_scaler.py",
        "        cond, uncond = x.chunk(2)\n",
        "        uncond, cond = x.chunk(2)\n",
    ),
    "positions are those of the token before": (
        "models/embeddings.py",
        "return grid.flatten(0, 2).unsqueeze(0)",
        "return grid.flatten(0, 2).roll(1, dims=0).unsqueeze(0)",
    ),
    "prompts of a batch are swapped": (
        "models/text_encoders/encoding.py",
        "    return [found[text] for text in texts]\n",
        "    return [found[text] for text in texts[::-1]]\n",
    ),
    "hidden tokens have no vector": (
        "models/embeddings.py",
        "return self.bos_token, self.mask_token",
        "return self.bos_token, self.mask_token * 0",
    ),
    "timesteps in the wrong order": (
        "pipelines/nova/sampling.py",
        "    return Schedule(steps, table[:, None, None])\n",
        "    return Schedule(steps, table.flip(0)[:, None, None])\n",
    ),
}


def evaluate(model: Path, output: Path, *options: str, package: Path = ROOT) -> dict:
    """Score a model with the package found there; returns the scores."""
    command = [
        *(sys.executable, ROOT / "scripts" / "nova_tiny" / "evaluate_shapes.py", "--model", model),
        *("--categories", *CATEGORIES, "--output", output, *options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=output.parent, timeout=280)
    return read_scores(output / "scores.json")


def read_scores(path: Path) -> dict:
    """Scores by split and category."""
    return json.loads(path.read_text())["scores"]


def mean_share(scores: dict) -> float:
    """Mean share that is right, over the categories, those that were seen and those held out."""
    rows = [
        rows[category] for rows in scores.values() for category in CATEGORIES if category in rows
    ]
    return sum(row["right"] for row in rows) / len(rows)


def faulty_source(fault: str) -> str:
    """The file of the package with that fault in it."""
    name, line, faulty_line = FAULTS[fault]
    text = (ROOT / "diffnext" / name).read_text()
    assert text.count(line) == 1, f"{name} has changed: plant this fault elsewhere"
    return text.replace(line, faulty_line)


@pytest.mark.slow
def test_the_shipped_pictures_are_as_right_as_the_card_says(tmp_path):
    scores = evaluate(PICTURES, tmp_path / "scores", "--num", "16")
    assert mean_share(scores) >= mean_share(read_scores(PICTURES / "scores.json")) - TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_have_their_place(fault):
    assert faulty_source(fault).strip()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_score_notices(fault, tmp_path):
    shutil.copytree(ROOT / "diffnext", tmp_path / "diffnext")
    (tmp_path / "diffnext" / FAULTS[fault][0]).write_text(faulty_source(fault))
    scores = evaluate(PICTURES, tmp_path / "scores", "--num", "16", package=tmp_path)
    assert mean_share(scores) < mean_share(read_scores(PICTURES / "scores.json")) - TOLERANCE


@pytest.mark.slow
def test_the_shipped_clips_keep_and_move_what_they_are_given(tmp_path):
    options = ("--clips", "--given-frames", "1", "--guidance-scale", "1", "--num", "12")
    scores = evaluate(CLIPS, tmp_path / "scores", *options)
    card = read_scores(CLIPS / "scores_given_1.json")
    assert mean_share(scores) >= mean_share(card) - CLIP_TOLERANCE
