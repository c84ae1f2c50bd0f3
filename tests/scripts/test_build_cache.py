"""The commands as they are typed: real kills, several processes, training on the result."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffnext.cli.cache import build_parser, main, make_settings
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.inspection import find_problems
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.records import RecordDataset
from tests.data.caching_inputs import (
    draw_picture,
    numbered_frames,
    read_files,
    save_vae,
    save_video_vae,
    write_pictures,
    write_video,
)

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds that a loaded machine may take to begin


def command(*arguments):
    return [sys.executable, "-m", "diffnext", "cache", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def count_chunks(output):
    chunks = output / ".building" / "chunks"
    return sum(path.suffix != ".partial" for path in chunks.iterdir()) if chunks.is_dir() else 0


def run_and_kill(arguments, output, rng):
    """Start a build and kill it some time after a few more chunks are complete."""
    wanted = count_chunks(output) + rng.randint(1, 4)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while count_chunks(output) < wanted and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the build ended before it was killed"


@pytest.mark.slow
def test_pictures_survive_two_kills_and_train(scratch_run, tmp_path):
    write_pictures(tmp_path / "in", 230)
    (tmp_path / "in" / "0100.png").write_bytes(b"bad")
    output = tmp_path / "out"
    options = ("--vae", scratch_run.base, "--size", 64, "--batch-size", 2, "--chunk-size", 4)
    arguments = command("images", tmp_path / "in", "--output", output, *options, "--quiet")
    rng = random.Random(0)
    for _ in range(2):
        run_and_kill(arguments, output, rng)
        assert not (output / "METADATA").exists()
    printed = run(arguments)
    assert f"{output}: 229 examples" in printed and "1 of 230 images left out" in printed
    with RecordDataset(output) as dataset:
        sources = [example["source"] for example in dataset]
    assert sources == [f"{number:04d}.png" for number in range(230) if number != 100]
    assert list(find_problems(output)) == []
    whole = tmp_path / "whole"
    args = build_parser().parse_args(
        ["images", str(tmp_path / "in"), "--output", str(whole), *map(str, options)]
    )
    build_cache(make_settings(args, "cpu"))
    assert read_files(output) == read_files(whole)

    scratch_run.train(
        f"train_dataloader.params.dataset={output}",
        "train_dataloader.params.max_examples=229",
        "training.max_train_steps=2",
    )
    status = json.loads((scratch_run.output / "status.json").read_text())
    assert status["status"] == "finished"


@pytest.mark.slow
def test_clips_survive_two_kills(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    for number in range(24):
        write_video(tmp_path / "in" / f"{number:02d}.mp4", numbered_frames(10 + number % 3))
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"clip {number}")
    output = tmp_path / "out"
    options = ["--vae", save_video_vae(tmp_path / "vae"), "--size", 32, "--num-frames", 5]
    options += ["--stride", 1, "--clips", 2, "--chunk-size", 1, "--batch-size", 2, "--quiet"]
    arguments = command("videos", tmp_path / "in", "--output", output, *options)
    rng = random.Random(1)
    for _ in range(2):
        run_and_kill(arguments, output, rng)
    assert f"{output}: 48 examples" in run(arguments)
    with RecordDataset(output) as dataset:
        sources = [example["source"] for example in dataset]
    assert sources == [f"{number:02d}.mp4#{clip}" for number in range(24) for clip in range(2)]
    with FeatureDataLoader(output, batch_size=4, num_workers=0) as loader:
        batch = loader.next()[0]
    assert batch["latents"].shape == (4, 8, 2, 4, 4) and len(batch["motion_flow"]) == 4


@pytest.mark.slow
def test_several_processes_share_a_build(tmp_path):
    write_pictures(tmp_path / "in", 21)
    vae = save_vae(tmp_path / "vae")
    options = ["--vae", vae, "--size", 32, "--chunk-size", 2, "--device", "cpu", "--quiet"]
    arguments = ["images", tmp_path / "in", *options, "--output"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launched = [*launcher, *command(*arguments, tmp_path / "two")[1:]]
    printed = run(launched)
    assert printed.count("21 examples") == 1
    run(command(*arguments, tmp_path / "one"))
    assert read_files(tmp_path / "two") == read_files(tmp_path / "one")


def test_help_needs_no_torch():
    program = (
        "import sys; from diffnext.cli import cache, inspect_cache\n"
        "for module in (cache, inspect_cache):\n"
        "    text = module.build_parser().format_help()\n"
        "    assert 'skipped.jsonl' in text or 'sheet' in text\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_a_wrong_size_is_an_error_before_torch_is_imported():
    program = (
        "import sys; from diffnext.cli.cache import main\n"
        "arguments = ['images', 'in', '--output', 'out', '--vae', 'vae', '--size', '32y32']\n"
        "assert main(arguments) == 1 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "32y32"], "a size is SIDE or HEIGHTxWIDTH in pixels, got '32y32'"),
        (["--size", "32", "32x32"], "sizes must differ"),
        (["--size", "32", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--size", "32", "--max-upscale", "nan"], "max_upscale must be at least 1"),
        (["--size", "32", "--caption-column", "title"], "there is no folder or file"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, capsys, options, message):
    arguments = ["images", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--vae", "vae", "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_builds_a_table(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        draw_picture(number).save(tmp_path / "pictures" / f"{number}.png")
    rows = "".join(f"{n}.png,prompt {n}\n" for n in range(3))
    (tmp_path / "list.csv").write_text(f"name,prompt\n{rows}missing.png,none\n")
    arguments = ["images", tmp_path / "list.csv", "--root", tmp_path / "pictures"]
    arguments += ["--media-column", "name", "--caption-column", "prompt", "--size", "32", "--quiet"]
    arguments += ["--output", tmp_path / "out", "--vae", save_vae(tmp_path / "vae")]
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "3 examples" in printed and "1 of 4 images left out" in printed
    with RecordDataset(tmp_path / "out") as dataset:
        assert [example["caption"] for example in dataset] == ["prompt 0", "prompt 1", "prompt 2"]
