"""Checkpoint folders: which one is found, and that half of one never is."""

import shutil

import pytest
import torch

from diffnext.engine.checkpoint import (
    RunFolder,
    find_resume_point,
    load_weights_into,
    publish,
    temporary_folder,
    write_component,
)
from diffnext.utils.json_files import write_json
from diffnext.utils.omegaconf_utils import ConfigError


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "checkpoints-of-mine")  # the word may occur in any path


def weights():
    return torch.nn.Linear(3, 2).state_dict()


def add_checkpoint(run, step, file_format="safetensors", state=True, ema=True):
    folder = run.checkpoint(step)
    write_component(folder / "transformer", {"a": 1}, weights(), file_format)
    if state:
        (folder / "state").mkdir()
        write_json(folder / "state" / "trainer_state.json", {"step": step})
    if ema:
        ema_folder = run.ema_checkpoint(step) / "transformer"
        write_component(ema_folder, {"a": 1}, weights(), file_format)
    return folder


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_nothing_to_resume_means_a_fresh_start(run):
    assert find_resume_point(run, "latest") is None
    add_checkpoint(run, 3)
    assert find_resume_point(run, "") is None
    assert find_resume_point(run, None) is None


def test_latest_is_the_highest_step_not_the_last_name(run):
    for step in (9, 10, 5):
        add_checkpoint(run, step)
    point = find_resume_point(run, "latest")
    assert point.step == 10
    assert point.checkpoint == run.checkpoint(10)
    assert point.ema_weights.parent == run.ema_checkpoint(10) / "transformer"
    assert point.trainer_state == {"step": 10}


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_checkpoint_with_cut_weights_is_passed_over(run, file_format):
    add_checkpoint(run, 3)
    broken = add_checkpoint(run, 6, file_format)
    cut(next(broken.glob("transformer/diffusion_pytorch_model.*")))
    assert find_resume_point(run, "latest").step == 3


def test_checkpoint_without_its_trainer_state_is_passed_over(run):
    add_checkpoint(run, 3)
    (add_checkpoint(run, 6) / "state" / "trainer_state.json").unlink()
    assert find_resume_point(run, "latest").step == 3


def test_folder_that_was_being_written_is_passed_over(run):
    add_checkpoint(run, 3)
    temporary = temporary_folder(run.checkpoint(6))
    shutil.copytree(run.checkpoint(3), temporary)
    assert find_resume_point(run, "latest").step == 3
    run.remove_leftovers()
    assert not temporary.exists()
    assert run.checkpoint(3).exists()


def test_explicit_path_may_end_in_a_slash(run):
    add_checkpoint(run, 3)
    add_checkpoint(run, 6)
    point = find_resume_point(run, f"{run.checkpoint(3)}/")
    assert point.step == 3
    assert point.ema_weights is not None


def test_layout_with_weights_only_is_found_without_state(run):
    folder = add_checkpoint(run, 7, "bin", state=False, ema=False)
    for resume in ("latest", folder):
        point = find_resume_point(run, resume)
        assert (point.step, point.state, point.ema_weights) == (7, None, None)
        assert point.weights.name == "diffusion_pytorch_model.bin"


@pytest.mark.parametrize("name", ["checkpoint-7/transformer", "my-model-7"])
def test_bare_component_folder_takes_its_step_from_the_path(run, tmp_path, name):
    write_component(tmp_path / name, {}, weights(), "safetensors")
    point = find_resume_point(run, tmp_path / name)
    assert (point.step, point.state) == (7, None)


@pytest.mark.parametrize(
    "name, message", [("nowhere-3", "no such folder"), ("empty-3", "no readable"), ("x", "step")]
)
def test_unusable_path_is_explained(run, tmp_path, name, message):
    (tmp_path / "empty-3").mkdir()
    write_component(tmp_path / "x", {}, weights(), "safetensors")
    with pytest.raises(ConfigError, match=message):
        find_resume_point(run, tmp_path / name)


def test_weights_that_do_not_fit_are_listed(run):
    add_checkpoint(run, 3)
    point = find_resume_point(run, "latest")
    with pytest.raises(ConfigError, match=r"do not fit the model(.|\n)*weight"):
        load_weights_into(torch.nn.Linear(4, 2), point.weights)


def test_written_config_does_not_tell_where_weights_came_from(tmp_path):
    write_component(tmp_path / "t", {"_name_or_path": "/tmp/secret", "a": 1}, weights(), "bin")
    assert "secret" not in (tmp_path / "t" / "config.json").read_text()


def test_publishing_replaces_what_was_there(tmp_path):
    final = tmp_path / "checkpoint-1"
    temporary = temporary_folder(final)
    for folder, text in ((final, "old"), (temporary, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    publish(temporary, final)
    assert (final / "file").read_text() == "new"
    assert not temporary.exists()


def test_only_the_newest_checkpoints_are_kept(run):
    for step in (3, 6, 10):
        add_checkpoint(run, step)
    run.keep_newest(2)
    kept = sorted(path.name for path in run.checkpoint(3).parent.iterdir())
    assert kept == ["checkpoint-10", "checkpoint-6"]
    assert not run.ema_checkpoint(3).exists()
    assert run.ema_checkpoint(6).exists()
