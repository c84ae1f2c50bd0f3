"""What goes wrong in long runs: each fault ends in one clear error, and nothing is lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine import control, snapshot
from diffnext.engine.control import EXIT_STOPPED
from diffnext.engine.validation import Validator
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from tests.engine.conftest import TinyRun

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
FOREIGN_TOKEN = {"id": 1000, "content": "[OTHER]", **FLAGS}


def with_dataset(run, tmp_path, change):
    """The same run on a copy of its records in which ``change`` may alter each example."""
    folder = tmp_path / "changed"
    folder.mkdir()
    features = {"moments": "bytes", "caption": "string", "shape": ["int64"]}
    with RecordWriter(str(folder), features) as writer:
        for index, example in enumerate(RecordDataset(run.dataset)):
            writer.write(change(index, dict(example)))
    return TinyRun(run.base, folder, run.output)


def poisoned(examples):
    def change(index, example):
        if index in examples:
            example["moments"] = np.full((8, 8, 8), np.nan, dtype=np.float16).tobytes()
        return example

    return change


IN_ORDER = ["train_dataloader.params.shuffle=false", "training.batch_size=2"]


def test_bad_record_stops_the_run_by_step_tensor_and_example(tiny_run, tmp_path):
    run = with_dataset(tiny_run, tmp_path, poisoned([5]))
    error = run.fail(*IN_ORDER, "experiment.save_every=2", "training.max_train_steps=6")
    assert "step 2 is not finite: loss is nan on examples [4, 5] of the dataset" in error
    assert [path.name for path in run.output.glob("checkpoints/checkpoint-*")] == ["checkpoint-2"]


def test_bad_record_can_be_left_out(tiny_run, tmp_path):
    run = with_dataset(tiny_run, tmp_path, poisoned([5]))
    options = ["training.on_nonfinite=skip", "training.max_train_steps=6"]
    run.train(*IN_ORDER, *options, "ema.params.update_every=1")
    assert "step 2 is not finite" in run.log() and "This step is left out" in run.log()
    steps = [json.loads(line)["step"] for line in (run.output / "metrics.jsonl").open()]
    assert steps == [0, 1, 3, 4, 5]
    for folder in (run.checkpoint(6), run.ema_checkpoint(6)):
        weights = load_weights(folder)
        assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("seldom", ["experiment.log_every=20", "experiment.save_every=3"])
def test_a_step_that_is_looked_at_late_is_named_and_left_out_all_the_same(
    tiny_run, tmp_path, seldom
):
    run = with_dataset(tiny_run, tmp_path, poisoned([5]))
    options = [*IN_ORDER, "training.max_train_steps=6", "experiment.log_every=20", seldom]
    error = run.fail(*options)
    assert "step 2 is not finite: loss is nan on examples [4, 5] of the dataset" in error
    assert not list(run.output.glob("checkpoints/*"))
    run.train(*options, "training.on_nonfinite=skip")
    assert run.log().count("step 2 is not finite: loss is nan on examples [4, 5]") == 1
    saved = load_file(run.checkpoint(6) / "state" / "engine.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert {value.item() for name, value in saved.items() if name.endswith(".step")} == {5}


@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_gradient_that_is_not_finite_is_named_and_the_step_left_out(tiny_run, monkeypatch, fused):
    def forward(model, inputs):
        zero = (model.image_decoder.head.bias * 0).sum()
        return {"loss": compute(model, inputs)["loss"] + zero.sqrt()}  # whose slope is infinite

    compute = NOVATransformer3DModel.forward
    monkeypatch.setattr(NOVATransformer3DModel, "forward", forward)
    options = [f"optimizer.params.fused={fused}", "training.max_train_steps=1"]
    error = tiny_run.fail(*options)
    culprit = "step 0 is not finite: the gradient of image_decoder.head.bias"
    assert f"{culprit}. Nothing of this step was applied" in error
    tiny_run.train(*options, "training.on_nonfinite=skip")
    assert f"{culprit}. This step is left out" in tiny_run.log()
    start, end = load_weights(tiny_run.base), load_weights(tiny_run.checkpoint(1))
    torch.testing.assert_close(end, start, rtol=0, atol=0)


def load_weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_record_of_another_shape_is_named(tiny_run, tmp_path):
    def change(index, example):
        if index == 10:
            example["shape"] = [8, 4, 8]
        return example

    run = with_dataset(tiny_run, tmp_path, change)
    error = run.fail(*IN_ORDER, "training.max_train_steps=6")
    assert "step 5 cannot start" in error and "example 10" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_record_cut_short_is_named(tiny_run, tmp_path, workers):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_run.dataset, folder)
    data = folder / "00000.data"
    lines = (folder / "00000.index").read_text().splitlines()
    content = bytearray(data.read_bytes())
    start = int(lines[10].split()[0])
    content[start : start + 40] = b"\xff" * 40
    data.write_bytes(bytes(content))
    run = TinyRun(tiny_run.base, folder, tiny_run.output)
    workers = f"train_dataloader.params.num_workers={workers}"
    error = run.fail(*IN_ORDER, workers, "training.max_train_steps=6")
    assert "step 5 cannot start" in error
    assert "example 10" in error and "00000.data" in error


def killing_the_reader_in(function):
    """The function, but the process that reads dies during its first call."""
    others = multiprocessing.active_children()  # of tests before this one
    killed = []

    def wrapper(*args, **kwargs):
        if not killed:  # as looking for children would bury the dead one before it is noticed
            (reader,) = set(multiprocessing.active_children()) - set(others)
            reader.kill()
            os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)
            killed.append(reader)
        return function(*args, **kwargs)

    return wrapper


ONE_READER = "train_dataloader.params.num_workers=1"


def test_reading_process_that_dies_while_the_model_computes_is_named(tiny_run, monkeypatch):
    compute = killing_the_reader_in(NOVATransformer3DModel.forward)
    monkeypatch.setattr(NOVATransformer3DModel, "forward", compute)
    error = tiny_run.fail(ONE_READER, "training.max_train_steps=1000")
    assert "step 1 cannot start: RuntimeError: DataLoader worker" in error
    assert "is killed by signal: Killed" in error


def test_reading_process_that_dies_while_a_checkpoint_is_written_does_not_spoil_it(
    tiny_run, monkeypatch
):
    monkeypatch.setattr(snapshot.torch, "save", killing_the_reader_in(snapshot.torch.save))
    error = tiny_run.fail(ONE_READER, "experiment.save_every=2", "training.max_train_steps=1000")
    assert "step 2 cannot start: RuntimeError: DataLoader worker" in error
    assert [path.name for path in tiny_run.output.glob("checkpoints/*")] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_ends_the_run_after_a_whole_step_with_a_checkpoint(tiny_run, number):
    before = signal.getsignal(signal.SIGTERM)

    def send_after_some_steps():
        while not (tiny_run.output / "metrics.jsonl").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_after_some_steps, daemon=True)
    sender.start()
    options = ["training.max_train_steps=100000", "experiment.save_every=100000"]
    tiny_run.fail(*options, code=EXIT_STOPPED)
    assert f"received {number.name}" in tiny_run.log()
    (checkpoint,) = (tiny_run.output / "checkpoints").iterdir()
    step = int(checkpoint.name.split("-")[1])
    last = json.loads((tiny_run.output / "metrics.jsonl").read_text().splitlines()[-1])
    assert step == last["step"] + 1
    assert signal.getsignal(signal.SIGTERM) is before
    status = json.loads((tiny_run.output / "status.json").read_text())
    assert status["status"] == "stopped" and status["exit_code"] == EXIT_STOPPED


def test_time_limit_stops_and_the_same_command_continues(tiny_run, monkeypatch):
    metrics = tiny_run.output / "metrics.jsonl"
    clock = SimpleNamespace(monotonic=lambda: 0.0)  # an hour later once a run has done 4 steps
    monkeypatch.setattr(control, "time", clock)
    for last in (4, 8):
        clock.monotonic = lambda last=last: 3600.0 * (count_lines(metrics) >= last)
        tiny_run.fail("training.max_train_steps=100", "training.time_limit=1h", code=EXIT_STOPPED)
    assert tiny_run.log().count("training.time_limit of 3600 s reached") == 2
    assert "Resume from" in tiny_run.log()
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(8))


def count_lines(file):
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture
def small_files(monkeypatch):
    """No file may grow beyond 300 kB: writing more fails as on a full disk."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave it cut off
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_failed_write_ends_the_run_and_leaves_the_last_checkpoint(
    tiny_run, small_files, async_save
):
    options = [f"checkpoint.async_save={async_save}", "experiment.save_every=2"]
    tiny_run.train(*options, "training.max_train_steps=2")
    small_files()
    error = tiny_run.fail(*options, "training.max_train_steps=100")
    assert "checkpoint-4 could not be written" in error
    assert "the newest sound checkpoint is checkpoint-2" in error
    names = [path.name for path in (tiny_run.output / "checkpoints").iterdir()]
    assert names == ["checkpoint-2"]


def test_signal_in_the_last_step_changes_nothing(tiny_run, monkeypatch):
    def forward(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args, **kwargs)

    compute = NOVATransformer3DModel.forward
    monkeypatch.setattr(NOVATransformer3DModel, "forward", forward)
    tiny_run.train("training.max_train_steps=1")
    assert tiny_run.checkpoint(1).is_dir()


@pytest.mark.parametrize("phase", ["before the first step", "in validation", "in saving"])
def test_signal_in_other_phases_stops_after_them(tiny_run, monkeypatch, phase):
    """Nothing is lost, nothing half written, and the same command continues."""
    owner, name = {
        "before the first step": (NOVATransformer3DModel, "set_gradient_checkpointing"),
        "in validation": (Validator, "run"),
        "in saving": (snapshot.torch, "save"),
    }[phase]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    options = ["experiment.save_every=2", "validation={every: 2, holdout: 0.25}"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        tiny_run.fail(*options, "training.max_train_steps=6", code=EXIT_STOPPED)
    first = 0 if phase == "before the first step" else 2
    assert f"Stopping at step {first}: received SIGTERM" in tiny_run.log()
    assert len(list(tiny_run.output.glob("checkpoints/*"))) == (1 if first else 0)
    tiny_run.train(*options, "training.max_train_steps=4")
    steps = [json.loads(line)["step"] for line in (tiny_run.output / "metrics.jsonl").open()]
    assert sorted(set(steps)) == [0, 1, 2, 3]


def test_output_folder_in_use_is_refused_with_its_holder(tiny_run):
    """And free again, once that process is dead."""
    code = (
        "import sys, time; from pathlib import Path; from diffnext.engine.output_lock import locked"
        "\nwith locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_run.output)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        error = tiny_run.fail("training.max_train_steps=1", code=2)
        holder.kill()
    assert "is in use by another run" in error
    assert f"process {holder.pid} on {socket.gethostname()}" in error
    assert not (tiny_run.output / "checkpoints").exists()
    tiny_run.train("training.max_train_steps=1")


@pytest.mark.parametrize(
    "output", ["/proc/run", "a_file/run", "x" * 300], ids=["proc", "below a file", "long name"]
)
def test_impossible_output_folder_is_one_sentence(tiny_run, tmp_path, output):
    (tmp_path / "a_file").touch()
    error = tiny_run.fail(f"experiment.output_dir={tmp_path / output}", code=2)
    assert error.startswith(f"error: experiment.output_dir={tmp_path / output}")
    assert "\n" not in error


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("model_index.json", {"vae": ["diffusers", "DDPMScheduler"]}, "no such component"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, "AutoModel"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "got DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"shift": -1}, "shift must be greater than 0"),
        ("vae/config.json", {"scaling_factor": "0.5"}, "scaling_factor must be a number"),
        ("vae/config.json", {"layers_per_block": "two"}, "vae cannot be loaded"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "text_encoder cannot be loaded"),
        ("tokenizer/tokenizer_config.json", {"pad_token": [1]}, "tokenizer cannot be loaded"),
        ("tokenizer/tokenizer.json", {"added_tokens": [FOREIGN_TOKEN]}, "which its text encoder"),
    ],
)
def test_base_folder_that_cannot_be_loaded_is_one_line(tiny_run, tmp_path, file, values, message):
    base = shutil.copytree(tiny_run.base, tmp_path / "base")
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **values}))
    run = TinyRun(base, tiny_run.dataset, tiny_run.output)
    error = run.fail("training.max_train_steps=1", code=2)
    assert error.startswith(f"error: pipeline.paths.pretrained_path={base}: ")
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    "name",
    [
        *(".lock", "metrics.jsonl", "status.json", "logs", "checkpoints", "ema_checkpoints"),
        *("checkpoints/.checkpoint-1.tmp", "checkpoints/checkpoint-0", "validation/step-1"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "pipe"])
def test_run_folder_cannot_lead_a_run_out_of_it(tiny_run, tmp_path, name, kind):
    """Not even into files and folders that are not there yet."""
    outside = tmp_path / "outside" / "target"
    (outside if kind == "folder" else outside.parent).mkdir(parents=True)
    if kind == "file":
        outside.write_text("precious")
    place = tiny_run.output / name
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to(outside)
    error = tiny_run.fail("training.max_train_steps=1", code=2)
    reason = " must be a f" if kind == "pipe" else " is a link that leads out of"
    assert error.startswith(f"error: {place}{reason}") and "\n" not in error
    kept = [path for path in outside.parent.rglob("*") if path != outside]
    assert not kept and (kind != "file" or outside.read_text() == "precious")
    assert outside.exists() == (kind in ("file", "folder"))


@pytest.mark.parametrize("name", ["config.yaml", "curves.png", "metrics.jsonl.tmp"])
def test_what_a_run_replaces_may_be_a_link_which_is_not_followed(tiny_run, tmp_path, name):
    (tmp_path / "outside").write_text("precious")
    tiny_run.output.mkdir()
    (tiny_run.output / name).symlink_to(tmp_path / "outside")
    tiny_run.train("training.max_train_steps=1", "experiment.save_every=1")
    tiny_run.train("training.max_train_steps=2", "experiment.save_every=1")
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tiny_run.output / name).is_symlink()


FRESH = "experiment.resume_from_checkpoint="


def test_fresh_run_in_a_used_folder_keeps_both_runs(tiny_run):
    options = ["experiment.save_every=2", "checkpoint.keep_last=1"]
    tiny_run.train(*options, "training.max_train_steps=6", "checkpoint.keep_last=null")
    old = {step: load_weights(tiny_run.checkpoint(step)) for step in (2, 4, 6)}
    tiny_run.train(*options, FRESH, "training.max_train_steps=4", "training.seed=7")
    log = tiny_run.log()
    assert "has checkpoints of another run, up to step 6" in log
    new = load_weights(tiny_run.checkpoint(4))
    assert any(not new[name].equal(value) for name, value in old[4].items())
    for step in (2, 4, 6):
        moved = tiny_run.output.glob(f"replaced-*/checkpoints/checkpoint-{step}")
        folder = next(moved, tiny_run.checkpoint(step))
        assert all(load_weights(folder)[n].equal(value) for n, value in old[step].items())
    # "latest" is the newest of the second run.
    tiny_run.train(*options, "training.max_train_steps=5", "training.seed=7")
    assert f"Resume from {tiny_run.checkpoint(4)} at step 4" in tiny_run.log()


@pytest.mark.parametrize(
    "what", ["checkpoint", "report", "curves", "pictures", "leftover", "settings", "log", "status"]
)
def test_what_cannot_be_deleted_or_reported_does_not_end_the_run(tiny_run, monkeypatch, what):
    options = ["training.max_train_steps=4", "experiment.save_every=1", "checkpoint.keep_last=1"]
    options += ["validation={every: 1, prompts: [a red star], num_inference_steps: 2}"]
    if what == "checkpoint":

        def busy(path, *args, **kwargs):
            if "checkpoint" in str(path):
                raise OSError(16, "Device or resource busy", str(path))
            return rmtree(path, *args, **kwargs)

        rmtree = shutil.rmtree
        monkeypatch.setattr(snapshot.shutil, "rmtree", busy)
    names = {"report": "metrics.jsonl", "curves": "curves.png", "pictures": "validation"}
    names |= {"settings": "config.yaml", "log": "logs", "status": "status.json"}
    if what in names:  # a folder where the file shall be, or the reverse
        tiny_run.output.mkdir()
        path = tiny_run.output / names[what]
        path.touch() if what in ("pictures", "log") else (path / "full").mkdir(parents=True)
    if what == "leftover":
        (tiny_run.output / "checkpoints").mkdir(parents=True)
        (tiny_run.output / "checkpoints" / ".checkpoint-98.tmp").touch()
    tiny_run.train(*options)
    assert tiny_run.checkpoint(4).is_dir()
    if what == "checkpoint":
        assert "could not be deleted and is left there" in tiny_run.log()
