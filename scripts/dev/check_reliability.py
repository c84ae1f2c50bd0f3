"""What training runs survive, and what saving costs: the tables of docs/reliability.md.

    python scripts/dev/check_reliability.py resume --kills 10 --launcher plain zero2_x2
    python scripts/dev/check_reliability.py faults --tmpfs /mnt/small
    OMP_NUM_THREADS=1 python scripts/dev/check_reliability.py saving

resume: for every launcher and precision one run goes straight through, and one is killed (SIGKILL,
all its processes) at random moments and started again by the same command. Losses, gradient norms
and the files of the final weights and averages must agree to the last byte; the exit code is 1 if
any byte differs.

faults: each fault is caused from outside in a running training (a killed process, a damaged file, a
full disk, a signal). The table shows the message, the exit code, the seconds until every process
was gone, and the newest checkpoint, from which a new start would continue.

saving: in one process, in turns, only steps, then a save, then steps until it is on the disk.
"blocked" is the time in which no step could be made.

A tiny model and records that differ example by example are made first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarking.faults import DISK_FULL, bring_about, make_faults
from benchmarking.runs import (
    LAUNCHERS,
    ON_CPU,
    count_differences,
    last_step,
    make_inputs,
    run_to_end,
    started,
)
from benchmarking.tables import print_head, print_row
from diffnext.cli.parsing import command_parser

WARM_UP = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    return args.check(args)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("check_reliability.py", __doc__)
    checks = parser.add_subparsers(required=True)
    resume = checks.add_parser("resume", help="kill and continue")
    resume.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=ON_CPU)
    resume.add_argument("--precision", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    resume.add_argument("--steps", type=int, default=120, help="length of a run (120)")
    resume.add_argument("--kills", type=int, default=10, help="of one run (10)")
    resume.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    resume.set_defaults(check=check_resume)
    faults = checks.add_parser("faults", help="damage, full disks, signals")
    faults.add_argument("--tmpfs", type=Path, help="small file system (20 MB) for the full disk")
    faults.add_argument("--only", default="", help="faults with this text in their name")
    faults.add_argument("--launcher", choices=LAUNCHERS, help="faults of this launcher")
    faults.set_defaults(check=check_faults)
    saving = checks.add_parser("saving", help="at once and in the background")
    saving.add_argument("--steps", type=int, default=20, help="before each save (20)")
    saving.add_argument("--turns", type=int, default=5, help="saves of each kind (5)")
    saving.set_defaults(check=measure_saving)
    for check in (resume, faults, saving):
        check.add_argument("--output", type=Path, default=Path("reliability"), help="folder")
    return parser.parse_args(argv)


# --- killed and continued -----------------------------------------------------------------------


def check_resume(args: argparse.Namespace) -> int:
    """Compare killed runs with straight ones; the exit code is 1 if a byte differs."""
    inputs = make_inputs(args.output)
    print_head(
        "run", "precision", "killed at steps", "loss bytes differing", "weight bytes differing"
    )
    total = 0
    for launcher in args.launcher:
        for precision in args.precision:
            options = [*inputs, f"training.mixed_precision={precision}"]
            folder = args.output / f"{launcher}-{precision}"
            shutil.rmtree(folder, ignore_errors=True)
            kills, differing = compare_runs(folder, launcher, options, args)
            total += sum(differing)
            print_row(launcher, precision, ", ".join(map(str, kills)), *differing)
    return 1 if total else 0


def compare_runs(
    folder: Path, launcher: str, options: Sequence[str], args: argparse.Namespace
) -> tuple[list[int], tuple[int, int]]:
    """Make a straight and a killed run.

    Returns:
        The steps that were reported at each kill, and the differing bytes of metrics and weights.

    Raises:
        RuntimeError: If a run fails by itself.
    """
    rng = random.Random(args.seed)
    options = [*options, f"training.max_train_steps={args.steps}"]
    options.append(f"experiment.save_every={max(1, args.steps // 20)}")
    straight, killed = folder / "straight", folder / "killed"
    run_to_end(launcher, options, straight)
    kills = [
        run_and_kill(launcher, options, killed, target, rng.random() * 0.2)
        for target in sorted(rng.sample(range(1, args.steps - 1), args.kills))
    ]
    run_to_end(launcher, options, killed)
    return kills, count_differences(straight, killed, args.steps)


def run_and_kill(
    launcher: str, options: Sequence[str], output: Path, target: int, delay: float
) -> int:
    """Start a run and kill it some time after it has reported a step.

    Returns:
        The last step reported.

    Raises:
        RuntimeError: If it ends by itself.
    """
    with started(launcher, options, output) as process:
        begin = time.time()
        metrics = output / "metrics.jsonl"
        # A run first drops the lines of steps that it will do again.
        while not metrics.exists() or metrics.stat().st_mtime < begin or last_step(output) < target:
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before step {target}, see {output}.log")
            time.sleep(0.005)
        time.sleep(delay)
    return last_step(output)


# --- faults -------------------------------------------------------------------------------------


def check_faults(args: argparse.Namespace) -> int:
    """Bring about the faults of the command line."""
    inputs = [*make_inputs(args.output), "training.mixed_precision=no"]
    print_head("fault", "run", "message", "exit code", "seconds", "continues from")
    for index, fault in enumerate(make_faults(args.output, args.tmpfs)):
        if args.only in fault.name and args.launcher in (None, fault.launcher):
            output = args.output / f"run{index}"
            if DISK_FULL in fault.name:
                output = args.tmpfs / "run"
            print_row(fault.name, fault.launcher, *bring_about(fault, inputs, output))
    return 0


# --- saving -------------------------------------------------------------------------------------


# Seconds of: steps without a save; steps while a checkpoint is being written; each save in which no
# step could be made; each save until it is on the disk.
SAVING = ("step alone, s", "step beside it, s", "blocked, s", "on disk after, s")


def measure_saving(args: argparse.Namespace) -> int:
    """Time both ways to save."""
    print_head("save", *SAVING)
    for way, is_async in (("at once", "false"), ("in the background", "true")):
        columns = save_in_turns(args, f"checkpoint.async_save={is_async}")
        print_row(way, *(f"{statistics.median(one):.3f}" if one else "-" for one in columns))
    return 0


def save_in_turns(args: argparse.Namespace, option: str) -> tuple[list[float], ...]:
    """Train and save in turns; returns the columns of the table."""
    folder = args.output / "saving"
    trainer = make_trainer(
        [
            *make_inputs(folder, arch=None),
            f"experiment.output_dir={(folder / 'run').resolve()}",
            "experiment.resume_from_checkpoint=''",
            "experiment.log_every=20",
            "training.batch_size=8",
            "train_dataloader.params.num_workers=0",
            "ema.params.update_every=20",
            "checkpoint.keep_last=1",
            option,
        ]
    )
    for _ in range(WARM_UP):
        step(trainer)
    columns: tuple[list[float], ...] = ([], [], [], [])
    alone, beside, blocked, written = columns
    trainer.global_step = int(time.time())  # names that no earlier call has used
    for _ in range(args.turns):
        alone += [step(trainer) for _ in range(args.steps)]
        start = time.perf_counter()
        trainer.save()
        blocked.append(time.perf_counter() - start)
        while trainer.writer.is_writing:
            beside.append(step(trainer))
        written.append(time.perf_counter() - start)
        trainer.writer.wait()
    trainer.close()
    return columns


def make_trainer(options: Sequence[str]) -> Any:
    """A trainer whose steps are taken one by one."""
    from accelerate.state import AcceleratorState

    from diffnext.config.load import get_config, parse
    from diffnext.config.schema import TrainConfig
    from diffnext.engine.train_engine import Trainer
    from diffnext.utils.accelerate_utils import build_accelerator, set_logger

    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse(get_config([*options, "training.max_train_steps=1000000"]), TrainConfig)
    accelerator = build_accelerator(config)
    return Trainer(config, accelerator, set_logger(level="WARNING", accelerator=accelerator))


def step(trainer: Any) -> float:
    """Do one step; returns its seconds."""
    start = time.perf_counter()
    trainer.run_step(accum_steps=1)
    trainer.global_step += 1
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
