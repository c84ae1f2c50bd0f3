"""The guide's own words: its snippet runs, and the demo that follows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffnext.data.flex_loaders import FeatureDataLoader

ROOT = Path(__file__).parents[2]


def cache_snippet(kind):
    """The first Python block of TRAINING.md that writes records of images or videos."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "TRAINING.md").read_text(), re.DOTALL)
    return next(block for block in blocks if f"./{kind}_dataset" in block)


def run_snippet(kind, vae_path, vae, folder):
    """Run a snippet on the CPU with a small autoencoder."""
    snippet = cache_snippet(kind)
    replacements = {
        'torch.device("cuda"), torch.float16': 'torch.device("cpu"), torch.float32',
        vae_path: str(ROOT / "assets" / vae),
        "latent_dist.parameters.cpu()": "latent_dist.parameters.half().cpu()",
    }
    for old, new in replacements.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    (folder / "assets").symlink_to(ROOT / "assets")
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)


@pytest.mark.slow
def test_the_image_cache_snippet_runs_as_written(tmp_path):
    pytest.importorskip("codewithgpu")
    run_snippet("img", "/path/to/nova-d48w1024-sdxl1024/vae", "vae-tiny", tmp_path)
    with FeatureDataLoader(tmp_path / "img_dataset", batch_size=2) as loader:
        assert len(loader.dataset) == 16
        batch = loader.next()[0]
    assert batch["latents"].shape == (2, 8, 128, 128)
    assert set(batch["prompt"]) <= {"long caption", "short text"}


@pytest.mark.slow
def test_the_video_cache_snippet_runs_as_written(tmp_path):
    pytest.importorskip("codewithgpu")
    pytest.importorskip("decord")
    run_snippet("vid", "/path/to/nova-d48w1024-osp480/vae", "vae-tiny-video", tmp_path)
    with FeatureDataLoader(tmp_path / "vid_dataset", batch_size=2) as loader:
        assert len(loader.dataset) == 16
        batch = loader.next()[0]
    assert batch["latents"].shape == (2, 8, 9, 60, 96)
    assert batch["motion_flow"] == [5, 5]


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
