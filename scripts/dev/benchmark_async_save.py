"""Measure what writing a checkpoint costs a training run, at once and in the background.

    python scripts/dev/benchmark_async_save.py --output async_check

In one process, in turns: steps alone, then a save, then steps until it is on the disk. "blocked" is
the time in which no step could be made.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.state import AcceleratorState

from check_resume import make_inputs
from diffnext.config.load import get_config, parse
from diffnext.config.schema import TrainConfig
from diffnext.engine.engine_utils import count_params
from diffnext.engine.train_engine import Trainer
from diffnext.utils.accelerate_utils import build_accelerator, set_logger

WARM_UP = 3


@dataclass
class Measurement:
    """Seconds of one way to save.

    Attributes:
        alone: Steps without a save.
        beside: Steps while a checkpoint is being written.
        blocked: Time of each save in which no step could be made.
        written: Time of each save until it is on the disk.
    """

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("async_check"), help="folder to write")
    parser.add_argument("--steps", type=int, default=20, help="measured alone in a turn (20)")
    parser.add_argument("--turns", type=int, default=5, help="saves of each kind (5)")
    parser.add_argument("arguments", nargs="*", help="for scripts/train.py, behind --")
    args = parser.parse_args(argv)
    inputs = [
        *make_inputs(args.output, arch=None),
        f"experiment.output_dir={(args.output / 'run').resolve()}",
        "experiment.resume_from_checkpoint=''",
        "experiment.log_every=20",
        "training.batch_size=8",
        "train_dataloader.params.num_workers=0",
        "ema.params.update_every=20",
        "checkpoint.keep_last=1",
        *args.arguments,
    ]
    print("| save | step alone, s | step beside it, s | ratio | blocked, s | on disk after, s |")
    print("|---|---|---|---|---|---|")
    for asynchronous in (False, True):
        result = measure(inputs, asynchronous, args)
        alone = statistics.median(result.alone)
        beside = statistics.median(result.beside) if result.beside else None
        print(
            f"| {'in the background' if asynchronous else 'at once'} | {alone:.3f} | "
            f"{'-' if beside is None else f'{beside:.3f}'} | "
            f"{'-' if beside is None else f'{beside / alone:.2f}'} | "
            f"{statistics.median(result.blocked):.3f} | {statistics.median(result.written):.3f} |",
            flush=True,
        )


def measure(inputs: Sequence[str], asynchronous: bool, args: argparse.Namespace) -> Measurement:
    """Train and save in turns."""
    trainer = make_trainer([*inputs, f"checkpoint.async_save={str(asynchronous).lower()}"])
    if not asynchronous:
        print(f"{count_params(trainer.bare_model):.1f}M parameters\n", file=sys.stderr)
    for _ in range(WARM_UP):
        step(trainer)
    result = Measurement()
    trainer.global_step = int(time.time())  # names that no earlier call has used
    for _ in range(args.turns):
        result.alone += [step(trainer) for _ in range(args.steps)]
        start = time.perf_counter()
        trainer.save()
        result.blocked.append(time.perf_counter() - start)
        while trainer.writer.is_writing:
            result.beside.append(step(trainer))
        result.written.append(time.perf_counter() - start)
        trainer.writer.wait()
    trainer.close()
    return result


def make_trainer(options: Sequence[str]) -> Trainer:
    """A trainer whose steps are taken one by one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse(get_config([*options, "training.max_train_steps=1000000"]), TrainConfig)
    accelerator = build_accelerator(config)
    return Trainer(config, accelerator, set_logger(level="WARNING", accelerator=accelerator))


def step(trainer: Trainer) -> float:
    """Do one step; returns its seconds."""
    start = time.perf_counter()
    trainer.run_step(accum_steps=1)
    trainer.global_step += 1
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
