"""Do to training runs what happens to them in long jobs, and show what they say.

    python scripts/dev/check_faults.py --output fault_check --tmpfs /mnt/small

Each fault is brought about from outside while a tiny run is going on (a killed process, a damaged
file, a full disk, a signal). The table shows the message, the exit code, the seconds until every
process was gone, and the newest checkpoint that a new start would continue from.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarking.processes import family
from check_resume import last_step, make_inputs, run_to_end, started
from diffnext.config.targets import ConfigError
from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine.resume import LATEST, find_resume_point
from diffnext.engine.snapshot import ENGINE, RunFolder

MESSAGE = re.compile(r"(^error: |^stopped at|checkpoint-\d+ is damaged|saved with \d+ proc).*")
KEEP_ALL = ["checkpoint.keep_last=null"]
VALIDATING = ["validation={every: 4, num_inference_steps: 4}"]
LONG = ["training.max_train_steps=1000000", "experiment.save_every=4", "checkpoint.keep_last=2"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: Row of the table.
        launcher: How the run is started, see check_resume.py.
        act: Does it to a run that has reached ``at_step``; None if it lies in the options.
        options: Further arguments of train.py.
        at_step: Step that must have been reported.
        at_file: Pattern of a file or folder that must be in the output folder, in its place.
        before: Prepares the output folder, given the options of the run.
    """

    name: str
    launcher: str
    act: Callable[[subprocess.Popen], None] | None = None
    options: Sequence[str] = ()
    at_step: int = 10
    at_file: str | None = None
    before: Callable[[Sequence[str], Path], None] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("fault_check"), help="folder to write")
    parser.add_argument("--tmpfs", type=Path, help="small file system (20 MB) for the full disk")
    parser.add_argument("--only", default="", help="run the faults with this text in their name")
    parser.add_argument("--launcher", help="run those under this launcher (see check_resume.py)")
    args = parser.parse_args(argv)
    inputs = [*make_inputs(args.output), "training.mixed_precision=no"]
    print("| fault | run | message | exit code | seconds | continues from |")
    print("|---|---|---|---|---|---|")
    for index, fault in enumerate(make_faults(args.output, args.tmpfs)):
        if args.only in fault.name and args.launcher in (None, fault.launcher):
            output = args.output / f"run{index}"
            if "disk full" in fault.name:
                output = args.tmpfs / "run"
            shutil.rmtree(output, ignore_errors=True)
            print(bring_about(fault, inputs, output), flush=True)


def make_faults(folder: Path, tmpfs: Path | None) -> list[Fault]:
    """All faults; that of the full disk only if there is a small file system."""
    bad_shape = copy_records(folder, "bad_shape", cut_moments)
    not_finite = copy_records(folder, "not_finite", poison_moments)
    below_file = folder / "a_file"
    below_file.touch()
    faults = [
        Fault("loader worker killed", "plain", kill_worker),
        Fault("rank killed", "plain_x2", kill_rank),
        Fault("rank killed", "zero2_x2", kill_rank),
        Fault("corrupt record", "plain_x2", options=[bad_shape], at_step=-1),
        Fault("record with NaN, stop", "plain_x2", options=[not_finite], at_step=-1),
        Fault("record with NaN, stop", "zero2_x2", options=[not_finite], at_step=-1),
        Fault(
            "output below a file",
            "plain",
            options=[f"experiment.output_dir={below_file.resolve()}/run"],
            at_step=-1,
        ),
        Fault(
            "newest checkpoint truncated",
            "plain",
            options=["training.max_train_steps=16"],
            at_step=-1,
            before=leave_truncated_checkpoint,
        ),
        Fault(
            "one byte flipped in the newest checkpoint",
            "plain",
            options=["training.max_train_steps=16"],
            at_step=-1,
            before=leave_flipped_checkpoint,
        ),
        Fault("output in /proc", "plain", options=["experiment.output_dir=/proc/run"], at_step=-1),
        Fault(
            "1 process, then 2, then 1",
            "plain",
            options=["training.max_train_steps=20"],
            at_step=-1,
            before=train_with_one_and_two,
        ),
        Fault("SIGTERM before the first step", "plain", terminate, at_file="config.yaml"),
        Fault(
            "SIGTERM in validation", "plain", terminate, VALIDATING, at_file="validation/*/raw.png"
        ),
        Fault("SIGTERM in saving", "plain", terminate, at_file="checkpoints/.checkpoint-*.tmp"),
        Fault("SIGTERM", "plain", terminate),
        Fault("SIGTERM", "plain_x2", terminate),
        Fault("SIGTERM", "zero2_x2", terminate),
    ]
    if tmpfs is not None:
        faults.append(Fault("disk full", "plain", options=KEEP_ALL, at_step=-1))
        faults.append(Fault("disk full", "zero2_x2", options=KEEP_ALL, at_step=-1))
        asynchronous = [*KEEP_ALL, "checkpoint.async_save=true"]
        faults.append(Fault("disk full, async", "plain", options=asynchronous, at_step=-1))
    return faults


def has_come(fault: Fault, output: Path) -> bool:
    """Whether a run is where a fault is to happen."""
    if fault.at_file is not None:
        return any(output.glob(fault.at_file))
    return last_step(output) >= fault.at_step


def bring_about(fault: Fault, inputs: Sequence[str], output: Path) -> str:
    """Start a run, do the fault to it and wait for its end; returns a row of the table."""
    options = [*inputs, *LONG, "training.batch_size=2", *fault.options]
    log_file = output.parent / f"{output.name}.log"
    if fault.before is not None:
        fault.before(options, output)
    log_file.unlink(missing_ok=True)
    begin = time.monotonic()
    with started(fault.launcher, options, output) as process:
        while not has_come(fault, output) and process.poll() is None:
            time.sleep(0.02)
        begin = time.monotonic()
        members = family(process)
        if fault.act is not None:
            fault.act(process)
        code = process.wait()
        psutil.wait_procs(members, timeout=60)
        seconds = time.monotonic() - begin
        left = [member for member in members if member.is_running()]
    lines = log_file.read_text().splitlines()
    messages = [match[0] for line in lines if (match := MESSAGE.search(line))]
    message = "; ".join(dict.fromkeys(messages)) or "NO MESSAGE"
    when = f"{seconds:.1f}" if fault.act is not None else f"{seconds:.1f} from the start"
    rest = f" ({len(left)} processes left)" if left else ""
    newest = newest_checkpoint(output)
    return f"| {fault.name} | {fault.launcher} | {message} | {code} | {when}{rest} | {newest} |"


def newest_checkpoint(output: Path) -> str:
    """Name of the checkpoint that a new start would continue from."""
    try:
        point = find_resume_point(RunFolder(output), LATEST)
    except ConfigError:  # all are damaged
        point = None
    return "none" if point is None else point.checkpoint.name


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes of a run in the order of their ranks, without loader workers."""
    trainers = [member for member in family(process) if is_trainer(member)]
    ranks = [member for member in trainers if not is_trainer(member.parent())]
    return sorted(ranks, key=lambda member: int(member.environ().get("RANK", 0)))


def is_trainer(member: psutil.Process) -> bool:
    """Whether a process runs train.py itself."""
    command = member.cmdline()
    return any(word.endswith("train.py") for word in command[:3])


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


def leave_flipped_checkpoint(options: Sequence[str], output: Path) -> None:
    """Train for 12 steps and flip one bit of the newest checkpoint's optimizer state."""
    run_to_end("plain", [*options, "training.max_train_steps=12"], output)
    run = RunFolder(output)
    path = run.checkpoint(run.steps()[-1]) / ENGINE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def train_with_one_and_two(options: Sequence[str], output: Path) -> None:
    """Train for 12 steps with one process and for 4 more with two."""
    run_to_end("plain", [*options, "training.max_train_steps=12"], output)
    run_to_end("plain_x2", [*options, "training.max_train_steps=16"], output)


def leave_truncated_checkpoint(options: Sequence[str], output: Path) -> None:
    """Train for 12 steps and cut the largest file of the newest checkpoint in half."""
    run_to_end("plain", [*options, "training.max_train_steps=12"], output)
    run = RunFolder(output)
    newest = run.checkpoint(run.steps()[-1])
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def copy_records(folder: Path, name: str, change: Callable[[dict], None]) -> str:
    """Copy the records and spoil one that no check before a run samples; returns the argument."""
    target = folder / name
    if not target.exists():
        target.mkdir()
        examples = [dict(example) for example in RecordDataset(folder / "records")]
        change(examples[-2])
        features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
        with RecordWriter(str(target), features) as writer:
            for example in examples:
                writer.write(example)
    return f"train_dataloader.params.dataset={target.resolve()}"


def cut_moments(example: dict) -> None:
    """Lose half of the latents."""
    example["moments"] = example["moments"][: len(example["moments"]) // 2]


def poison_moments(example: dict) -> None:
    """Replace the latents by NaN."""
    shape = example["shape"]
    example["moments"] = np.full(shape, np.nan, dtype=np.float16).tobytes()


if __name__ == "__main__":
    main()
