"""Do to training runs what happens to them in long jobs, and show what they say.

    python scripts/check_faults.py --output fault_check --tmpfs /mnt/small

Each fault is brought about from outside while a tiny run is going on (a killed process, a damaged
file, a full disk, a signal). The table shows the message, the exit code, the seconds until every
process was gone, and the newest checkpoint that a new start would continue from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from check_resume import last_step, make_inputs, started

from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.engine.checkpoint import RunFolder

KEEP_ALL = ["checkpoint.keep_last=null"]
LONG = ["training.max_train_steps=1000000", "experiment.save_every=4", "checkpoint.keep_last=2"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: Row of the table.
        launcher: How the run is started, see check_resume.py.
        act: Does it to a run that has reached ``at_step``: called with the process id of the run's
            session and the output folder; None if it lies in the options.
        options: Further arguments of train.py.
        at_step: Step that must have been reported.
    """

    name: str
    launcher: str
    act: Callable[[int, Path], None] | None = None
    options: Sequence[str] = ()
    at_step: int = 10


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


def bring_about(fault: Fault, inputs: Sequence[str], output: Path) -> str:
    """Start a run, do the fault to it and wait for its end; returns a row of the table."""
    options = [*inputs, *LONG, "training.batch_size=2", *fault.options]
    log_file = output.parent / f"{output.name}.log"
    log_file.unlink(missing_ok=True)
    begin = time.monotonic()
    with started(fault.launcher, options, output) as process:
        while last_step(output) < fault.at_step and process.poll() is None:
            time.sleep(0.05)
        begin = time.monotonic()
        if fault.act is not None:
            fault.act(process.pid, output)
        code = process.wait()
        seconds = time.monotonic() - begin
        left = session_members(process.pid)
    lines = log_file.read_text().splitlines()
    messages = [line for line in lines if line.startswith(("error: ", "stopped at"))]
    message = "; ".join(dict.fromkeys(messages)) or "NO MESSAGE"
    checkpoints = RunFolder(output).complete_checkpoints()
    newest = checkpoints[-1].name if checkpoints else "none"
    when = f"{seconds:.1f}" if fault.act is not None else f"{seconds:.1f} from the start"
    rest = f" ({len(left)} processes left)" if left else ""
    return f"| {fault.name} | {fault.launcher} | {message} | {code} | {when}{rest} | {newest} |"


def session_members(session: int) -> list[int]:
    """Processes of a session, without zombies."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def training_processes(session: int) -> list[int]:
    """The ranks of a run, without launcher and loader workers, by rank."""
    ranks = {}
    members = session_members(session)
    for pid in members:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        is_worker = parent in ranks.values()
        if b"scripts/train.py" in command and b"launch" not in command and not is_worker:
            rank = next((v for v in environment if v.startswith(b"RANK=")), b"RANK=0")
            ranks.setdefault(int(rank[5:]), pid)
    return [pid for _, pid in sorted(ranks.items())]


def kill_rank(session: int, output: Path) -> None:
    """Kill the second rank."""
    os.kill(training_processes(session)[1], signal.SIGKILL)


def kill_worker(session: int, output: Path) -> None:
    """Kill the reading process of the only rank."""
    rank = training_processes(session)[0]
    children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def terminate(session: int, output: Path) -> None:
    """Send SIGTERM to every process, launcher included, as a job scheduler does."""
    os.killpg(session, signal.SIGTERM)


def copy_records(folder: Path, name: str, change: Callable[[dict], None]) -> str:
    """Copy the records and spoil the last; returns the argument that names the copy."""
    target = folder / name
    if not target.exists():
        target.mkdir()
        examples = [dict(example) for example in RecordDataset(folder / "records")]
        change(examples[-1])
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
