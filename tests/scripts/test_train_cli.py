"""The command line of scripts/train.py: what it refuses, and how it says so."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(scratch_run):
    return scratch_run.arguments()


def run(arguments):
    runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"](arguments)


def refuse(arguments):
    """Run and return the message of the expected clean exit."""
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    return message


def test_help_prints_usage_sections_and_keys(capsys):
    run(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py config=FILE.yaml")
    for section in ("experiment:", "pipeline.paths:", "training:", "checkpoint:"):
        assert f"\n{section}" in text
    assert "  training.mixed_precision  (str | bool | None, default bf16)" in text


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.max_train_step=6", "training.max_train_steps"),
        ("--training.seed=3", "without dashes"),
        ("training.mixed_precision=fp8", "mixed_precision must be no, fp16 or bf16"),
        ("experiment.save_every=0", "experiment.save_every must be a whole number"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last must be a whole number"),
        ("checkpoint.format=zip", "checkpoint.format must be safetensors or bin"),
        ("experiment.resume_from_checkpoint=/nowhere-3", "no such folder"),
        ("pipeline.paths.pretrained_path=/path/to/none", "pretrained_path=/path/to/none"),
        ("train_dataloader.params.dataset=/path/to/none", "Unsupported dataset: /path/to/none"),
        ("training.max_train_steps=${training.sed}", "does not resolve"),
        ("training.max_train_steps=", "training.max_train_steps is required"),
    ],
)
def test_wrong_argument_is_refused_by_name(arguments, override, message):
    assert message in refuse([*arguments, override])


def test_missing_config_is_explained(arguments):
    assert "config is required" in refuse(arguments[1:])


def test_missing_output_folder_is_explained(arguments):
    message = refuse([a for a in arguments if "output_dir" not in a])
    assert "experiment.output_dir is required" in message


def test_output_folder_below_a_file_is_refused(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    message = refuse([*arguments, f"experiment.output_dir={tmp_path / 'file' / 'run'}"])
    assert f"{tmp_path / 'file'} is not a folder" in message


def test_base_folder_without_an_index_is_refused(arguments, scratch_run):
    (scratch_run.base / "model_index.json").unlink()
    assert "model_index.json does not exist" in refuse(arguments)


def test_dataset_with_damaged_metadata_is_refused(arguments, scratch_run):
    (scratch_run.dataset / "METADATA").write_text("{")
    assert "METADATA is damaged" in refuse(arguments)


def test_dataset_with_another_number_of_entries_is_refused(arguments, scratch_run):
    index = scratch_run.dataset / "00000.index"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    message = refuse(arguments)
    assert "12" in message and "11" in message and "METADATA" in message


def test_truncated_data_is_refused(arguments, scratch_run):
    data = scratch_run.dataset / "00000.data"
    data.write_bytes(data.read_bytes()[:-10])
    assert "00000.data" in refuse(arguments)


def test_refused_runs_leave_no_output_folder(arguments, scratch_run):
    refuse([*arguments, "train_dataloader.params.dataset=/path/to/none"])
    assert not scratch_run.output.exists()
