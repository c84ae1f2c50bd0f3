"""What goes wrong in long trainings, done to a tiny run from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarking.processes import family
from benchmarking.runs import FEATURES, last_step, log_of, run_to_end, started
from diffnext.config.targets import ConfigError
from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine.resume import LATEST, find_resume_point
from diffnext.engine.snapshot import ENGINE, RunFolder

MESSAGE = re.compile(r"(^error: |^stopped at|checkpoint-\d+ is damaged|saved with \d+ proc).*")
LONG = ("training.max_train_steps=1000000", "experiment.save_every=4", "checkpoint.keep_last=2")
FIRST_STEP = 10  # at which faults happen
DISK_FULL = "disk full"

Act = Callable[[subprocess.Popen], None]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: Row of the table.
        launcher: How the run is started, a key of ``LAUNCHERS``.
        act: Does it to a running training; None if the fault lies in the options.
        options: More arguments of train.py.
        at_file: Pattern of what must be in the output folder first; default: some steps.
        before: Prepares the output folder, given the options of the run.
    """

    name: str
    launcher: str = "plain"
    act: Act | None = None
    options: Sequence[str] = ()
    at_file: str | None = None
    before: Callable[[Sequence[str], Path], None] | None = None

    def is_due(self, output: Path) -> bool:
        """Whether the run is where the fault happens; at the start if it lies in the options."""
        if self.act is None:
            return True
        if self.at_file is not None:
            return any(output.glob(self.at_file))
        return last_step(output) >= FIRST_STEP


def make_faults(folder: Path, tmpfs: Path | None) -> list[Fault]:
    """All faults; the full disk only if there is a small file system."""
    bad_shape = [copy_records(folder, "bad_shape", cut_moments)]
    not_finite = [copy_records(folder, "not_finite", poison_moments)]
    below_file = folder / "a_file"
    below_file.touch()
    to_16, to_20 = (["training.max_train_steps=16"], ["training.max_train_steps=20"])
    validating = ["validation={every: 4, num_inference_steps: 4}"]
    full = ["checkpoint.keep_last=null"]
    faults = [
        Fault("loader worker killed", act=kill_worker),
        Fault("rank killed", "plain_x2", kill_rank),
        Fault("rank killed", "zero2_x2", kill_rank),
        Fault("corrupt record", "plain_x2", options=bad_shape),
        Fault("record with NaN, stop", "plain_x2", options=not_finite),
        Fault("record with NaN, stop", "zero2_x2", options=not_finite),
        Fault("output below a file", options=[f"experiment.output_dir={below_file.resolve()}/run"]),
        Fault("output in /proc", options=["experiment.output_dir=/proc/run"]),
        Fault("newest checkpoint truncated", options=to_16, before=partial(damage, truncate)),
        Fault(
            "one byte flipped in the newest checkpoint",
            options=to_16,
            before=partial(damage, flip_bit),
        ),
        Fault("1 process, then 2, then 1", options=to_20, before=train_with_one_and_two),
        Fault("SIGTERM before the first step", act=terminate, at_file="config.yaml"),
        Fault("SIGTERM in validation", "plain", terminate, validating, "validation/*/raw.png"),
        Fault("SIGTERM in saving", act=terminate, at_file="checkpoints/.checkpoint-*.tmp"),
        Fault("SIGTERM", "plain", terminate),
        Fault("SIGTERM", "plain_x2", terminate),
        Fault("SIGTERM", "zero2_x2", terminate),
    ]
    if tmpfs is None:
        return faults
    return [
        *faults,
        Fault(DISK_FULL, "plain", options=full),
        Fault(DISK_FULL, "zero2_x2", options=full),
        Fault(f"{DISK_FULL}, async", "plain", options=[*full, "checkpoint.async_save=true"]),
    ]


def bring_about(fault: Fault, inputs: Sequence[str], output: Path) -> list[Any]:
    """Start a run, do the fault to it and wait for its end.

    Returns:
        Its messages, exit code, seconds to the end, and newest checkpoint.
    """
    shutil.rmtree(output, ignore_errors=True)
    options = [*inputs, *LONG, "training.batch_size=2", *fault.options]
    if fault.before is not None:
        fault.before(options, output)
    log_of(output).unlink(missing_ok=True)
    with started(fault.launcher, options, output) as process:
        while not fault.is_due(output) and process.poll() is None:
            time.sleep(0.02)
        begin = time.monotonic()
        members = family(process)
        if fault.act is not None:
            fault.act(process)
        code = process.wait()
        psutil.wait_procs(members, timeout=60)
        seconds = f"{time.monotonic() - begin:.1f}"
        left = sum(member.is_running() for member in members)
    seconds += "" if fault.act is not None else " from the start"
    seconds += f" ({left} processes left)" if left else ""
    lines = log_of(output).read_text().splitlines()
    messages = [match[0] for line in lines if (match := MESSAGE.search(line))]
    message = "; ".join(dict.fromkeys(messages)) or "NO MESSAGE"
    return [message, code, seconds, newest_checkpoint(output)]


def newest_checkpoint(output: Path) -> str:
    """Name of the checkpoint that a new start would continue from."""
    try:
        point = find_resume_point(RunFolder(output), LATEST)
    except ConfigError:  # all are damaged
        point = None
    return "none" if point is None else point.checkpoint.name


# --- done to a run ------------------------------------------------------------------------------


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes of a run in the order of their ranks, without loader workers."""
    trainers = [member for member in family(process) if is_trainer(member)]
    ranks = [member for member in trainers if not is_trainer(member.parent())]
    return sorted(ranks, key=lambda member: int(member.environ().get("RANK", 0)))


def is_trainer(member: psutil.Process | None) -> bool:
    """Whether a process runs train.py itself."""
    return member is not None and any(word.endswith("train.py") for word in member.cmdline()[:3])


def kill_rank(process: subprocess.Popen) -> None:
    """Kill the second rank."""
    ranks_of(process)[1].kill()


def kill_worker(process: subprocess.Popen) -> None:
    """Kill the reading process of the only rank."""
    ranks_of(process)[0].children()[-1].kill()


def terminate(process: subprocess.Popen) -> None:
    """Send SIGTERM to every process, launcher included, as a job scheduler does."""
    for member in family(process):
        member.terminate()


# --- done before a run --------------------------------------------------------------------------


def damage(change: Callable[[Path], None], options: Sequence[str], output: Path) -> None:
    """Train for 12 steps and damage the newest checkpoint's optimizer state."""
    run_to_end("plain", [*options, "training.max_train_steps=12"], output)
    run = RunFolder(output)
    change(run.checkpoint(run.steps()[-1]) / ENGINE)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def train_with_one_and_two(options: Sequence[str], output: Path) -> None:
    """Train for 12 steps with one process and for 4 more with two."""
    run_to_end("plain", [*options, "training.max_train_steps=12"], output)
    run_to_end("plain_x2", [*options, "training.max_train_steps=16"], output)


def copy_records(folder: Path, name: str, change: Callable[[dict], None]) -> str:
    """Copy the records and spoil one that no check before a run samples; returns the argument."""
    target = folder / name
    if not target.exists():
        target.mkdir()
        examples = [dict(example) for example in RecordDataset(folder / "inputs" / "records")]
        change(examples[-2])
        with RecordWriter(target, FEATURES) as writer:
            for example in examples:
                writer.write(example)
    return f"train_dataloader.params.dataset={target.resolve()}"


def cut_moments(example: dict) -> None:
    """Lose half of the latents."""
    example["moments"] = example["moments"][: len(example["moments"]) // 2]


def poison_moments(example: dict) -> None:
    """Replace the latents by NaN."""
    example["moments"] = np.full(example["shape"], np.nan, dtype=np.float16).tobytes()
