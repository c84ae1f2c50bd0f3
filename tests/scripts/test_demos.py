"""The demos, which go through the commands of the guide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_video_demo_shows_and_continues(tmp_path):
    pytest.importorskip("codewithgpu")
    script = [sys.executable, str(ROOT / "scripts" / "demo_video.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in (2, 3):
        command = [*script, "--size", "64", "--steps", str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert "dB from its own clip" in result.stdout
        assert "dB from the given image" in result.stdout
    for name in ("sheet.png", "sheet_i2v.png", "0.mp4", "1.mp4"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
def test_the_demo_draws_and_continues(tmp_path):
    pytest.importorskip("codewithgpu")
    script = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in (2, 3):
        command = [*script, "--size", "64", "--steps", str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert "dB from its own picture" in result.stdout
        assert (tmp_path / "sheet.png").stat().st_size > 0
    checkpoints = tmp_path / "experiment" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-3"}
