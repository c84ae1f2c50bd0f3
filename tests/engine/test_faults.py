"""What goes wrong in long runs: each fault ends in one clear error, and nothing is lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine import checkpoint_writer
from diffnext.engine.control import EXIT_STOPPED
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from tests.engine.conftest import TinyRun


def error_of(run, *overrides):
    with pytest.raises(SystemExit) as stopped:
        run.train(*overrides)
    return stopped.value.code


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
    error = error_of(run, *IN_ORDER, "experiment.save_every=2", "training.max_train_steps=6")
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


def load_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_record_of_another_shape_is_named(tiny_run, tmp_path):
    def change(index, example):
        if index == 10:
            example["shape"] = [8, 4, 8]
        return example

    run = with_dataset(tiny_run, tmp_path, change)
    error = error_of(run, *IN_ORDER, "training.max_train_steps=6")
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
    error = error_of(run, *IN_ORDER, workers, "training.max_train_steps=6")
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
    error = error_of(tiny_run, ONE_READER, "training.max_train_steps=1000")
    assert "step 1 cannot start: RuntimeError: DataLoader worker" in error
    assert "is killed by signal: Killed" in error


def test_reading_process_that_dies_while_a_checkpoint_is_written_does_not_spoil_it(
    tiny_run, monkeypatch
):
    write = killing_the_reader_in(checkpoint_writer.torch.save)
    monkeypatch.setattr(checkpoint_writer.torch, "save", write)
    error = error_of(
        tiny_run, ONE_READER, "experiment.save_every=2", "training.max_train_steps=1000"
    )
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
    code = error_of(tiny_run, "training.max_train_steps=100000", "experiment.save_every=100000")
    assert code == EXIT_STOPPED
    assert f"received {number.name}" in tiny_run.log()
    (checkpoint,) = (tiny_run.output / "checkpoints").iterdir()
    step = int(checkpoint.name.split("-")[1])
    last = json.loads((tiny_run.output / "metrics.jsonl").read_text().splitlines()[-1])
    assert step == last["step"] + 1
    assert signal.getsignal(signal.SIGTERM) is before
    status = json.loads((tiny_run.output / "status.json").read_text())
    assert status["status"] == "stopped" and status["exit_code"] == EXIT_STOPPED


def test_time_limit_stops_and_the_same_command_continues(tiny_run):
    options = ["training.max_train_steps=100000", "training.time_limit=6s"]
    for _ in range(2):
        assert error_of(tiny_run, *options) == EXIT_STOPPED
    assert tiny_run.log().count("training.time_limit of 6 s reached") == 2
    assert "Resume from" in tiny_run.log()
    steps = [json.loads(line)["step"] for line in (tiny_run.output / "metrics.jsonl").open()]
    assert steps == list(range(len(steps)))


@pytest.fixture
def small_files():
    """No file may grow beyond 300 kB: writing more fails as on a full disk."""
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
    error = error_of(tiny_run, *options, "training.max_train_steps=100")
    assert "checkpoint-4 could not be written" in error
    assert "the newest complete checkpoint is checkpoint-2" in error
    names = [path.name for path in (tiny_run.output / "checkpoints").iterdir()]
    assert names == ["checkpoint-2"]


def test_truncated_newest_checkpoint_is_passed_over(tiny_run):
    tiny_run.train("training.max_train_steps=4", "experiment.save_every=2")
    engine_file = next((tiny_run.checkpoint(4) / "state" / "engine").glob("*.distcp"))
    engine_file.write_bytes(engine_file.read_bytes()[:-100])
    tiny_run.train("training.max_train_steps=5", "experiment.save_every=2")
    assert "ignoring the incomplete checkpoint" in tiny_run.log()
    assert f"Resume from {tiny_run.checkpoint(2)} at step 2" in tiny_run.log()
    error = error_of(
        tiny_run,
        "training.max_train_steps=9",
        f"experiment.resume_from_checkpoint={tiny_run.checkpoint(5)}x",
    )
    assert "no such folder" in error


def test_damaged_checkpoint_named_explicitly_is_an_error(tiny_run):
    tiny_run.train("training.max_train_steps=2")
    (tiny_run.checkpoint(2) / "state" / "rank_0.pt").unlink()
    resume = f"experiment.resume_from_checkpoint={tiny_run.checkpoint(2)}"
    error = error_of(tiny_run, "training.max_train_steps=3", resume)
    assert "rank_0.pt is missing" in error
