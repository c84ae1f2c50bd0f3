"""The demo, which goes through the commands of the guide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITTEN = {
    "pictures": ["sheet.png"],
    "clips": ["sheet.png", "sheet_i2v.png", "0.mp4", "1.mp4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITTEN)
def test_the_demo_draws_and_continues(tmp_path, what):
    script = [sys.executable, str(ROOT / "scripts" / "demo.py"), what, "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in (2, 3):
        command = [*script, "--size", "64", "--steps", str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert f"dB from its own {what[:-1]}" in result.stdout
        assert ("dB from the given image" in result.stdout) == (what == "clips")
    assert all((tmp_path / name).stat().st_size > 0 for name in WRITTEN[what])
    checkpoints = tmp_path / "experiment" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-3"}
