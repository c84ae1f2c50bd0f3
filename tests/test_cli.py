"""The ``diffnext`` command: it finds its sub-commands, teaches them, and says how they ended."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.cli import generate
from diffnext.cli.main import COMMANDS, main
from diffnext.pipelines import NOVAPipeline
from diffnext.utils import read_parameters
from diffnext.utils.folders import newest_checkpoint
from diffnext.utils.json_files import read_json, write_json
from diffnext.version import __version__
from tests.pipelines.conftest import make_class_pipeline, make_video_pipeline

ROOT = Path(__file__).parents[1]
NOVA_TINY = str(ROOT / "assets" / "nova-tiny")
QUICK = ["--num-inference-steps", "3", "--num-diffusion-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "nova-video"
    make_video_pipeline().save_pretrained(folder)
    return str(folder)


def run_generate(*words):
    return main(["generate", *map(str, words), *QUICK])


def refuse_generate(capsys, *words):
    assert run_generate(*words) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


# --- the command itself -------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and f"diffnext {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == text


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"diffnext {__version__}\n"


def test_a_mistyped_command_gets_the_nearest_one(capsys):
    with pytest.raises(SystemExit):
        main(["genrate", "a star"])
    shown = capsys.readouterr().err
    assert "there is no 'genrate'; did you mean generate? (see diffnext --help)" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("words", [["dance"], ["--dance"], ["generate"], ["generate", "--dance"]])
def test_wrong_command_lines_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_rest_and_gives_the_exit_code(name, monkeypatch):
    calls = []
    fake = ModuleType(COMMANDS[name][0])
    fake.main = lambda argv: calls.append(argv) or 7
    monkeypatch.setitem(sys.modules, COMMANDS[name][0], fake)
    assert main([name, "--some", "option", "--help"]) == 7
    assert calls == [["--some", "option", "--help"]]


def test_an_interruption_ends_with_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "main", interrupted)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_without_loading_torch(name):
    code = (
        "import sys, diffnext.cli.main as cli\n"
        "try:\n    cli.main([sys.argv[1], '--help'])\n"
        "finally:\n    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: diffnext {name}")
    assert result.stdout.count(f"diffnext {name} ") >= 3  # usage and examples


def test_drawing_loads_what_it_uses_and_prints_no_warnings_of_libraries(tmp_path):
    code = (
        "import sys, diffnext\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "from diffnext.cli.main import main\n"
        "main(['generate', 'a star', '--model', sys.argv[1] + '/none'])\n"
        "assert 'torch' not in sys.modules\n"
        "main(['generate', 'a star', '--model', sys.argv[1]])\n"
        "assert 'diffnext.pipelines' in sys.modules\n"
        "unused = {'diffnext.engine', 'diffnext.data', 'diffnext.config', 'omegaconf', 'pandas',\n"
        "    'pyarrow', 'matplotlib', 'imageio', 'deepspeed', 'torchvision', 'tensorboard',\n"
        "    'diffnext.models.autoencoders.autoencoder_kl_ltx'}\n"
        "print(*unused & set(sys.modules))\n"
        "import gc; print(gc.isenabled())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "\nTrue\n", result.stderr
    first, second = result.stderr.splitlines()
    assert first.startswith("error: there is no folder")
    assert second.endswith("is not a pipeline folder: it has no model_index.json")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "diffnext", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == f"diffnext {__version__}\n"


def test_the_installed_command_exists():
    (target,) = re.findall(r'^diffnext = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    module, _, function = target.partition(":")
    assert getattr(import_module(module), function) is main


# --- generate -----------------------------------------------------------------------------------


def test_pictures_are_those_of_the_pipeline_and_say_how_they_were_made(tmp_path, capsys):
    path = tmp_path / "new" / "star.png"
    words = ["--model", NOVA_TINY, "a red star", "--num-images", "2", "--seed", "4"]
    assert run_generate(*words, "--guidance-scale", "2.5", "--output", path) == 0
    paths = [path.with_stem(f"star-{index}") for index in range(2)]
    assert capsys.readouterr().out.splitlines()[-2:] == [str(path) for path in paths]
    images = NOVAPipeline.from_pretrained(NOVA_TINY, dtype=torch.float32)(
        ["a red star"] * 2,
        num_inference_steps=3,
        num_diffusion_steps=2,
        guidance_scale=2.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        output_type="np",
    ).images
    for file, image in zip(paths, images, strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), image)
    assert read_parameters(paths[1]) == {
        "model": "nova-tiny",
        "prompt": "a red star",
        "seed": 5,
        "guidance_scale": 2.5,
        "num_inference_steps": 3,
        "num_diffusion_steps": 2,
        "num_frames": 1,
    }


def test_a_negative_prompt_changes_the_picture(tmp_path):
    words = ["--model", NOVA_TINY, "a red star", "--output"]
    assert run_generate(*words, tmp_path / "a.png") == 0
    assert run_generate(*words, tmp_path / "b.png", "--negative-prompt", "a blue ring") == 0
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert not np.array_equal(first, second)
    assert read_parameters(tmp_path / "b.png")["negative_prompt"] == "a blue ring"


def test_a_video_begins_with_the_picture(video_model, tmp_path):
    from imageio import mimread

    picture = ROOT / "assets" / "sample_image.jpg"
    words = ["--model", video_model, "a cat", "--num-frames", "5", "--output"]
    assert run_generate(*words, tmp_path / "a.mp4") == 0
    assert run_generate(*words, tmp_path / "b.webm", "--image", picture) == 0
    first, second = (np.stack(mimread(tmp_path / name)) for name in ("a.mp4", "b.webm"))
    assert first.shape == second.shape == (5, 64, 96, 3)
    assert not np.array_equal(first, second)
    assert read_parameters(tmp_path / "b.webm")["image"] == picture.name


def test_a_video_model_draws_a_picture(video_model, tmp_path):
    assert run_generate("--model", video_model, "a cat", "--output", tmp_path / "a.webp") == 0
    with Image.open(tmp_path / "a.webp") as picture:
        assert picture.size == (96, 64)


def write_run(folder, checkpoints):
    """The output folder of a training, with checkpoints of nothing but their names."""
    write_json(folder / "status.json", {})
    for name in checkpoints:
        (folder / name).mkdir(parents=True)
        (folder / name / "model_index.json").touch()
    return folder


@pytest.mark.parametrize(
    ("checkpoints", "newest"),
    [
        (["checkpoints/checkpoint-9", "checkpoints/checkpoint-10"], "checkpoints/checkpoint-10"),
        (
            ["checkpoints/checkpoint-9", "ema_checkpoints/checkpoint-9"],
            "ema_checkpoints/checkpoint-9",
        ),
        (["checkpoints/checkpoint-9", "ema_checkpoints/checkpoint-8"], "checkpoints/checkpoint-9"),
        (["checkpoints/checkpoint-9", "checkpoints/checkpoint-10.tmp"], "checkpoints/checkpoint-9"),
    ],
)
def test_the_newest_checkpoint_of_a_run_is_found(tmp_path, checkpoints, newest):
    assert newest_checkpoint(write_run(tmp_path, checkpoints)) == tmp_path / newest


def test_checkpoints_of_an_earlier_run_in_the_folder_are_not_drawn_with(tmp_path):
    folder = write_run(tmp_path, ["checkpoints/checkpoint-6", "checkpoints/checkpoint-4"])
    write_json(folder / "status.json", {"run": "second"})
    for step, run in ((6, "first"), (4, "second")):
        state = folder / "checkpoints" / f"checkpoint-{step}" / "state"
        state.mkdir()
        write_json(state / "trainer_state.json", {"run": run})
    assert newest_checkpoint(folder).name == "checkpoint-4"


def test_a_run_draws_with_its_newest_checkpoint(tmp_path, capsys):
    run = write_run(tmp_path, ["checkpoints/checkpoint-1"])
    shutil.copytree(NOVA_TINY, run / "ema_checkpoints" / "checkpoint-1")
    assert run_generate("--model", run, "a red star", "--output", tmp_path / "a.png") == 0
    shutil.rmtree(run / "ema_checkpoints")
    shutil.rmtree(run / "checkpoints")
    message = refuse_generate(capsys, "--model", run, "a red star", "--output", tmp_path / "b.png")
    assert message == f"error: the training run in {run} has not written a checkpoint yet"


def test_a_long_video_is_drawn_from_its_latest_frames(video_model, tmp_path):
    from imageio import mimread

    words = ["--model", video_model, "a cat", "--num-frames", "13", "--output"]
    assert run_generate(*words, tmp_path / "a.mp4") == 0
    assert run_generate(*words, tmp_path / "b.mp4", "--max-context-frames", "1") == 0
    whole, cut = (np.stack(mimread(tmp_path / name)) for name in ("a.mp4", "b.mp4"))
    assert whole.shape == cut.shape and not np.array_equal(whole, cut)
    assert read_parameters(tmp_path / "b.mp4")["max_context_frames"] == 1


def test_new_files_replace_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("generated.png").touch()
    Path("generated-2.png").touch()
    paths = generate.choose_outputs(None, 2, ".png")
    assert [str(path) for path in paths] == ["generated-1.png", "generated-3.png"]


def test_prompts_may_stand_anywhere_and_in_a_file(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue ring\n\n  two stars \n")
    words = ["a red star", "--model", NOVA_TINY, "--prompts", prompts, "--output"]
    assert run_generate(*words, tmp_path / "a.png", "a cross") == 0
    paths = [tmp_path / f"a-{index}.png" for index in range(4)]
    assert capsys.readouterr().out.splitlines()[-4:] == [str(path) for path in paths]
    said = [read_parameters(path) for path in paths]
    assert [one["prompt"] for one in said] == ["a red star", "a cross", "a blue ring", "two stars"]
    assert [one["seed"] for one in said] == [0, 1, 2, 3]
    again = tmp_path / "again.png"  # each can be drawn again by itself
    assert run_generate("a blue ring", "--model", NOVA_TINY, "--seed", "2", "--output", again) == 0
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(paths[2])))


def test_what_is_not_said_is_taken_from_the_card(tmp_path):
    words = ["generate", "a ring", "--model", NOVA_TINY, "--device", "cpu", "--output"]
    assert main([*words, str(tmp_path / "a.png")]) == 0
    said = read_parameters(tmp_path / "a.png")
    assert (said["guidance_scale"], said["num_inference_steps"]) == (2.5, 16)
    assert main([*words, str(tmp_path / "b.png"), "--guidance-scale", "4"]) == 0
    assert read_parameters(tmp_path / "b.png")["guidance_scale"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--max-context-frames", "0"], "--max-context-frames must be at least 1, got 0"),
        (["--num-frames", "0"], "--num-frames must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be 0 to "),
        (["--seed", f"{2**63}"], "--seed must be 0 to "),
        (["--guidance-scale", "-2"], "--guidance-scale must be 0 to 100, got -2"),
        (["--image", "none.jpg"], "--image none.jpg: there is no such file"),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (["--modle", "x"], "unknown option --modle; did you mean --model? (see diffnext generate"),
        (["--output", "a.mp4"], "--output a.mp4 must be the name of a picture: use .png"),
        (["--output", "a.png", "--num-frames", "5"], "--output a.png must be the name of a video"),
        (["--prompts", "none.txt"], "--prompts none.txt cannot be read"),
        (["--guidance-scale", "much"], "invalid float value: 'much'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_generate("--model", "no-model", "a cat", *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_prompt_is_needed(capsys):
    with pytest.raises(SystemExit):
        run_generate("--model", "no-model")
    assert "a prompt is needed" in capsys.readouterr().err


def test_errors_are_one_line(video_model, tmp_path, capsys):
    output = ["--output", tmp_path / "a.png"]
    message = refuse_generate(capsys, "--model", tmp_path / "none", "a cat", *output)
    assert "there is no folder" in message
    (tmp_path / "nova-tiny").mkdir()
    message = refuse_generate(capsys, "--model", tmp_path / "nova-tny", "a cat", *output)
    assert message.endswith(f"did you mean {tmp_path / 'nova-tiny'}?")
    make_class_pipeline().save_pretrained(tmp_path / "classes")
    message = refuse_generate(capsys, "--model", tmp_path / "classes", "a cat", *output)
    assert "is class-conditional and takes no prompts" in message
    for name, change, words in (
        ("model_index.json", {"transformer": [None, None]}, "transformer"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**13}, "allocate"),
        ("scheduler/scheduler_config.json", {"shift": -1}, "shift must be greater than 0"),
        ("transformer/config.json", {"video_mixer_rank": 8}, "do not fit"),
    ):
        folder = shutil.copytree(NOVA_TINY, tmp_path / "changed", dirs_exist_ok=True)
        write_json(folder / name, {**read_json(folder / name), **change})
        assert words in refuse_generate(capsys, "--model", folder, "a cat", *output)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    video = ["--model", video_model, "a cat", "--num-frames", "5", "--output", tmp_path / "a.mp4"]
    message = refuse_generate(capsys, *video, "--image", tmp_path / "broken.jpg")
    assert "broken.jpg is not a picture" in message
    one_frame = [*video, "--num-frames", "1", "--output", tmp_path / "a.png"]
    message = refuse_generate(capsys, *one_frame, "--image", ROOT / "assets" / "sample_image.jpg")
    assert "sample_image.jpg is the beginning of a video: give --num-frames" in message
    video[video.index("5")] = "6"
    assert "cannot take 6 frames" in refuse_generate(capsys, *video)
    assert not list(tmp_path.glob("a.*"))


# --- train --------------------------------------------------------------------------------------


def test_train_is_the_trainer(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "training.seed=1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: config is required")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: diffnext train config=FILE.yaml")
    assert "-m diffnext train" in text and "\ntraining:" in text


@pytest.mark.slow
def test_a_launcher_starts_the_command(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "diffnext", "train", "training.seed=1"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[0]]
    assert "error: config is required" in lines[0]
    assert "error: config is required" in lines[-2]  # below the launcher's own traceback
