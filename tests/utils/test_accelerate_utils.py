"""Precision names, the log and the trackers."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import InitProcessGroupKwargs
from omegaconf import OmegaConf

from diffnext.config.load import flatten_omega_conf, get_config, parse
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError
from diffnext.utils import accelerate_utils
from diffnext.utils.accelerate_utils import (
    SafeTracker,
    build_accelerator,
    build_trackers,
    build_wandb,
    get_ddp_shards,
    normalize_precision,
    precision_to_dtype,
    set_logger,
)

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/nova_*.yaml"))
PICTURE = np.full((1, 8, 8, 3), 100, dtype=np.uint8)
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


def test_accumulation_of_a_launch_file_gives_way_to_the_configuration(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert build_accelerator(config(gradient_accumulation_steps=3)).gradient_accumulation_steps == 3


def test_further_arguments_reach_the_accelerator():
    built = build_accelerator(config(), cpu=True, step_scheduler_with_optimizer=False)
    assert built.device.type == "cpu"
    assert built.step_scheduler_with_optimizer is False


@pytest.mark.parametrize("spelling", ["no", "FP32", False])
def test_accelerator_takes_every_spelling_of_full_precision(spelling):
    assert build_accelerator(config(mixed_precision=spelling)).mixed_precision == "no"


def test_time_to_wait_for_other_processes_comes_from_the_configuration_or_the_caller():
    settings = config(process_group_timeout="1m30s")
    assert build_accelerator(settings).init_handler.timeout == timedelta(seconds=90)
    own = InitProcessGroupKwargs(timeout=timedelta(seconds=5))
    assert build_accelerator(settings, kwargs_handlers=[own]).init_handler is own


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


def shipped(file, tmp_path, *overrides):
    """A shipped configuration as it is given, and as a run reads it."""
    given = get_config([f"config={file}", f"experiment.output_dir={tmp_path}", *overrides])
    return given, parse(given, TrainConfig)


def given_values(given):
    """The values that trackers can show: None stands for a key left out."""
    leaves = dict(flatten_omega_conf(given, resolve=True))
    return {key: value for key, value in leaves.items() if value is not None}


def follow(accelerator):
    """Track a curve and a picture, and end."""
    for step, loss in enumerate((0.5, 0.25)):
        accelerator.log({"loss": loss}, step=step)
    for tracker in accelerator.trackers:
        tracker.log_images({"validation/raw": PICTURE}, step=1)
    accelerator.end_training()


def read_tensorboard(folder):
    """Configuration, curve and pictures of the event files below a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings, losses, pictures = {}, [], []
    for place in {file.parent for file in folder.rglob("events*")}:
        events = accumulator.EventAccumulator(str(place)).Reload()
        if events.Tags()["scalars"]:
            losses = [event.value for event in events.Scalars("loss")]
            images = events.Images("validation/raw") if events.Tags()["images"] else []
            pictures = [(image.width, image.height) for image in images]
            continue
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        settings = {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}
    return settings, losses, pictures


def read_records(file):
    """The records of a file of wandb: a log in blocks of 32 KiB, as of LevelDB."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, position, message = file.read_bytes(), 7, b""  # after the header of the file
    while position + 7 <= len(data):
        room = 32768 - position % 32768  # in this block
        if room < 7:
            position += room
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        position += 7 + size
        message += data[position - size : position]
        if kind in (1, 4) and position <= len(data):  # else more parts follow
            yield record.FromString(message)
            message = b""


def read_wandb(folder):
    """Configuration, curve and pictures of the offline run in a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # its service writes on after the end of the run
        records = list(read_records(file))
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    settings, losses = {}, []
    for record in records:
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        values = {"/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [json.loads(values["loss"])] if "loss" in values else []
    return settings, losses, [(8, 8) for _ in file.parent.glob("files/media/images/**/*.png")]


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", READERS)
def test_tracker_receives_a_shipped_configuration_curves_and_pictures(
    name, file, accelerator, monkeypatch, tmp_path, caplog
):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given, tree = shipped(file, tmp_path, f"tracking=[{name}]")
    run_id = build_trackers(tree, accelerator)
    assert (run_id is None) == (name == "tensorboard")
    follow(accelerator)
    settings, losses, pictures = READERS[name](tmp_path)
    assert given_values(given).items() <= settings.items()
    assert losses == [0.5, 0.25] and pictures == [(8, 8)]
    assert not [record for record in caplog.records if record.name.startswith("diffnext")]


class Recorder(GeneralTracker):
    """Takes the place of a tracker; fails when a method is called that it is told to fail in."""

    name = "recorder"
    requires_logging_directory = False
    tracker = None
    started: list = []
    failing: tuple = ()

    def __init__(self, project="", **arguments):
        self.arguments = {"project": project, **arguments}

    def start(self):
        self._fail("start")
        self.started.append(self.arguments)

    def store_init_configuration(self, values):
        self._fail("store_init_configuration")

    def log(self, values, step=None):
        self._fail("log")

    def log_images(self, values, step=None):
        self._fail("log_images")

    def finish(self):
        self._fail("finish")

    def _fail(self, method):
        if method in self.failing:
            raise OSError(f"no route to host in {method}")


@pytest.fixture
def recorder(monkeypatch):
    """Stands for wandb's tracker: what it is started with is seen, and the network is not used."""
    monkeypatch.setattr(accelerate_utils, "WandBTracker", Recorder)
    monkeypatch.setattr(accelerate_utils, "find_spec", lambda name: object())
    monkeypatch.setattr(Recorder, "started", [])
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    return Recorder


@pytest.mark.parametrize("tracking", [None, [], ["tensorboard"]])
def test_wandb_is_not_started_unasked(accelerator, recorder, tracking, tmp_path):
    settings = config()
    settings.experiment.output_dir = str(tmp_path)
    settings.wandb = None
    settings.tracking = tracking
    assert build_trackers(settings, accelerator) is None
    assert build_wandb(settings, accelerator) is None
    assert not recorder.started


def test_missing_wandb_gives_a_warning_and_no_tracking(accelerator, recorder, monkeypatch, caplog):
    monkeypatch.setattr(accelerate_utils, "find_spec", lambda name: None)
    assert build_wandb(config(), accelerator) is None
    assert not recorder.started
    assert "not installed" in caplog.text


def test_without_login_the_run_is_recorded_offline(accelerator, recorder):
    settings = config()
    run_id = build_wandb(settings, accelerator)
    (arguments,) = recorder.started
    assert arguments["mode"] == "offline" and arguments["resume"] is None
    assert arguments["id"] == run_id == settings.wandb.run_id


@pytest.mark.parametrize("configured, saved", [("abc", None), (None, "abc"), ("abc", "xyz")])
def test_known_run_is_resumed_and_the_mode_of_the_user_respected(
    accelerator, recorder, monkeypatch, configured, saved
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = config()
    settings.wandb.run_id = configured
    assert build_trackers(settings, accelerator, run_id=saved) == "abc"
    (arguments,) = recorder.started
    assert arguments["id"] == "abc" and arguments["resume"] == "allow"
    assert "mode" not in arguments


def test_login_in_netrc_counts(accelerator, recorder, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    build_wandb(config(), accelerator)
    assert "mode" not in recorder.started[0]


def test_tracker_that_cannot_start_is_left_out_with_a_warning(
    accelerator, recorder, monkeypatch, caplog
):
    monkeypatch.setattr(recorder, "failing", ("start",))
    build_wandb(config(), accelerator)
    assert accelerator.trackers == []
    assert "no route to host in start" in caplog.text


def test_tracker_that_fails_later_warns_once(accelerator, recorder, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "failing", ("log", "log_images", "finish"))
    build_wandb(config(), accelerator)
    follow(accelerator)
    assert [record.getMessage() for record in caplog.records if "failed" in record.msg] == [
        "recorder failed, so it may lack parts of this run: OSError: no route to host in log"
    ]


@pytest.mark.parametrize("method", ["store_init_configuration", "log", "log_images", "finish"])
def test_no_failure_of_a_tracker_is_raised(accelerator, recorder, monkeypatch, caplog, method):
    monkeypatch.setattr(recorder, "failing", (method,))
    tracker = SafeTracker(Recorder())
    tracker.store_init_configuration({"training.seed": 1})
    accelerator.trackers.append(tracker)
    follow(accelerator)
    assert caplog.text.count(f"no route to host in {method}") == 1


def test_tensorboard_drops_the_steps_that_are_done_again(accelerator, tmp_path):
    pytest.importorskip("tensorboard")
    _, tree = shipped(CONFIGS[0], tmp_path, "tracking=[tensorboard]")
    for first_step in (0, 1):
        build_trackers(tree, accelerator, first_step=first_step)
        accelerator.log({"loss": 1.0 + first_step}, step=first_step)
        accelerator.log({"loss": 1.5 + first_step}, step=first_step + 1)
        accelerator.trackers.pop().finish()
    assert read_tensorboard(tmp_path)[1] == [1.0, 2.0, 2.5]
