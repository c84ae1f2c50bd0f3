"""The command line of scripts/train.py: help, and all that is wrong in one go."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from diffnext.cli.train import print_once

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
MAIN = runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def refuse(capsys):
    def refuse(arguments):
        """Run and return the lines of the expected clean exit."""
        with pytest.raises(SystemExit) as stopped:
            MAIN(arguments)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return refuse


def test_help_prints_usage_sections_and_keys(capsys):
    MAIN(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py config=FILE.yaml")
    for section in ("experiment:", "pipeline.paths:", "training:", "checkpoint:"):
        assert f"\n{section}" in text
    assert "  training.mixed_precision  (no, fp16 or bf16, default bf16)" in text


# An argument, or the start of one to leave out; and the start of the message.
WRONG = {
    "config": "config is required: add config=<file.yaml>",
    "experiment.output_dir": "experiment.output_dir is required: add experiment.output_dir=...",
    "~training.max_train_steps": "training.max_train_steps is required",
    "experiment.resume_from_checkpoint=/nowhere-3": "experiment.resume_from_checkpoint=/nowhere-3: "
    "there is no folder",
    "pipeline.paths.pretrained_path=/nowhere": "pipeline.paths.pretrained_path=/nowhere",
    "train_dataloader.params.dataset=/nowhere": "train_dataloader.params.dataset: there is no "
    "folder /nowhere",
}


@pytest.mark.parametrize("argument", WRONG)
def test_what_is_missing_is_named(refuse, scratch_run, argument):
    arguments = scratch_run.arguments()
    if "=" in argument or argument.startswith("~"):
        arguments.append(argument)
    else:
        arguments = [word for word in arguments if word.partition("=")[0] != argument]
    (line,) = refuse(arguments)
    assert line.startswith(WRONG[argument])


def test_seven_mistakes_are_seven_lines(refuse, scratch_run):
    mistakes = {
        "training.sed=3": "unknown key 'training.sed'",
        "training.batch_size=two": "training.batch_size",
        "experiment.save_every=0": "experiment.save_every",
        "optimizer.target=torch.optim.AdamV": "optimizer.target",
        "lr_scheduler.params.warmup_steps=soon": "lr_scheduler.params.warmup_steps",
        "checkpoint.format=zip": "checkpoint.format",
        "pipeline.paths.pretrained_path=/nowhere": "pipeline.paths.pretrained_path=/nowhere",
    }
    lines = refuse(scratch_run.arguments(*mistakes))
    assert len(lines) == 7
    for start in mistakes.values():
        assert any(line.startswith(start) for line in lines)
    assert not scratch_run.output.exists()


@pytest.mark.slow  # a new process, which imports everything
def test_nothing_but_the_mistake_is_printed():
    command = [sys.executable, SCRIPT, "config=/nowhere.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("is_common", "printed"), [(True, ""), (False, "error: only here\n")])
def test_a_process_prints_what_the_main_one_may_not_know(monkeypatch, capsys, is_common, printed):
    monkeypatch.setenv("RANK", "1")
    print_once(["error: only here"], patience=0, is_common=is_common)
    assert capsys.readouterr().err == printed
