"""Precision names, the log and the tracker."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from diffnext.utils import accelerate_utils
from diffnext.utils.accelerate_utils import (
    build_accelerator,
    build_trackers,
    build_wandb,
    get_ddp_shards,
    normalize_precision,
    precision_to_dtype,
    set_logger,
)
from diffnext.utils.omegaconf_utils import ConfigError

LINE = re.compile(r"\d\d/\d\d \d\d:\d\d:\d\d INFO test_accelerate_utils\.py:\d+\] hello 3")


@pytest.fixture(autouse=True)
def clean_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    package = logging.getLogger("diffnext")
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True, log_with="wandb")


def config(**training):
    return OmegaConf.create(
        {
            "training": {"mixed_precision": "no", **training},
            "experiment": {"project": "p", "name": "n", "output_dir": "unused"},
            "wandb": {"run_id": None},
        }
    )


@pytest.mark.parametrize("name", ["no", "fp32", "FP32", False, None])
def test_full_precision_has_several_names(name):
    assert normalize_precision(name) == "no"


@pytest.mark.parametrize("name", ["fp8", "float16", True, 16])
def test_unknown_precision_is_refused(name):
    with pytest.raises(ConfigError, match="mixed_precision must be no, fp16 or bf16"):
        normalize_precision(name)


def test_precision_to_dtype_ignores_letter_case_and_falls_back_to_float32():
    names = ["fp16", "BF16", "fp32", "no", "anything"]
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert [precision_to_dtype(name) for name in names] == dtypes


def test_accelerator_takes_precision_and_accumulation_from_the_configuration():
    built = build_accelerator(config(mixed_precision="bf16", gradient_accumulation_steps=3))
    assert built.mixed_precision == "bf16"
    assert built.gradient_accumulation_steps == 3
    assert get_ddp_shards(built) == {"shard_id": 0, "num_shards": 1}


def test_further_arguments_reach_the_accelerator():
    built = build_accelerator(config(), cpu=True, step_scheduler_with_optimizer=False)
    assert built.device.type == "cpu"
    assert built.step_scheduler_with_optimizer is False


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works there")
def test_half_precision_without_an_accelerator_is_explained():
    with pytest.raises(ConfigError, match="mixed_precision=fp16"):
        build_accelerator(config(mixed_precision="fp16"))


def test_log_lines_have_the_documented_form(tmp_path, capsys, accelerator):
    logger = set_logger(str(tmp_path), accelerator=accelerator)
    logger.info("hello %d", 3)
    assert LINE.fullmatch(capsys.readouterr().out.strip())
    (file,) = tmp_path.glob("logs/*.log")
    assert re.fullmatch(r"\d{8}_\d{6}\.log", file.name)
    assert LINE.fullmatch(file.read_text().strip())


def test_second_set_up_replaces_the_first(tmp_path, capsys):
    set_logger(str(tmp_path / "a"))
    logger = set_logger(str(tmp_path / "b"))
    logger.info("hello %d", 3)
    assert capsys.readouterr().out.count("hello") == 1
    assert [path.read_text() for path in tmp_path.glob("a/logs/*.log")] == [""]


def test_modules_of_the_package_log_through_the_same_handlers(capsys):
    set_logger()
    logging.getLogger("diffnext.data.anything").info("from a module")
    assert "from a module" in capsys.readouterr().out


def test_other_ranks_log_errors_only(tmp_path, capsys, accelerator, monkeypatch):
    monkeypatch.setattr(type(accelerator.state), "is_main_process", property(lambda self: False))
    set_logger(str(tmp_path), accelerator=accelerator)
    logging.getLogger("diffnext.data").info("chatter")
    logging.getLogger("diffnext.data").error("failure")
    output = capsys.readouterr().out
    assert "failure" in output and "chatter" not in output
    assert not list(tmp_path.glob("logs/*"))


def test_import_needs_no_tracker():
    code = (
        "import sys, diffnext.utils.accelerate_utils; "
        "assert not {'wandb', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_tracking_without_a_section(accelerator, monkeypatch):
    started = []
    monkeypatch.setattr(accelerator, "init_trackers", lambda *a, **k: started.append(k))
    without = config()
    without.wandb = None
    build_wandb(without, accelerator)
    assert not started


def test_missing_wandb_gives_a_warning_and_no_tracking(accelerator, monkeypatch, caplog):
    started = []
    monkeypatch.setattr(accelerator, "init_trackers", lambda *a, **k: started.append(k))
    monkeypatch.setattr(accelerate_utils, "find_spec", lambda name: None)
    build_wandb(config(), accelerator)
    assert not started
    assert "not installed" in caplog.text


def wandb_arguments(settings, accelerator, monkeypatch):
    started = {}
    monkeypatch.setattr(accelerate_utils, "find_spec", lambda name: object())
    monkeypatch.setattr(
        accelerator, "init_trackers", lambda project, init_kwargs: started.update(init_kwargs)
    )
    build_wandb(settings, accelerator)
    return started["wandb"]


def test_without_login_the_run_is_recorded_offline(accelerator, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    settings = config()
    arguments = wandb_arguments(settings, accelerator, monkeypatch)
    assert arguments["mode"] == "offline"
    assert arguments["id"] == settings.wandb.run_id
    assert arguments["resume"] is None


def test_configured_run_is_resumed_and_the_mode_of_the_user_respected(accelerator, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = config()
    settings.wandb.run_id = "abc"
    arguments = wandb_arguments(settings, accelerator, monkeypatch)
    assert arguments["id"] == "abc" and arguments["resume"] == "allow"
    assert "mode" not in arguments


def test_login_in_netrc_counts(accelerator, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert "mode" not in wandb_arguments(config(), accelerator, monkeypatch)


def test_tracker_that_fails_does_not_end_the_run(accelerator, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(accelerate_utils, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerator, "init_trackers", fail)
    build_wandb(config(), accelerator)
    assert "no route to host" in caplog.text


def test_trackers_are_started_by_name(accelerator, monkeypatch, tmp_path):
    settings = config()
    settings.experiment.output_dir = str(tmp_path)
    settings.tracking = ["tensorboard"]
    build_trackers(settings, accelerator)
    assert [tracker.name for tracker in accelerator.trackers] == ["tensorboard"]
    accelerator.log({"loss": 1.0}, step=0)
    accelerator.trackers[0].finish()
    assert list(tmp_path.glob("tensorboard/*/events*"))


def test_without_names_only_a_wandb_section_starts_a_tracker(accelerator, monkeypatch):
    settings = config()
    settings.wandb = None
    build_trackers(settings, accelerator)
    settings.tracking = []
    build_trackers(settings, accelerator)
    assert accelerator.trackers == []
