"""``diffnext train``, and ``scripts/train.py``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from diffnext.cli.parsing import quiet_imports

PROGRAM = "diffnext train"
LAUNCH = """
On several devices or machines, a launcher starts the same command:
  accelerate launch --config_file accelerate_configs/8_gpus_ddp.yaml -m diffnext train config=...
  torchrun --nproc_per_node 2 -m diffnext train config=...

Example:
  diffnext train config=configs/nova_d48w1024_sdxl1024.yaml experiment.output_dir=runs/first \\
    pipeline.paths.pretrained_path=BASE train_dataloader.params.dataset=DATASET

Exit codes: 0 finished, 1 an error, 2 a configuration that cannot be used, 75 stopped by a signal or
a time limit: run it again to continue.
"""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: the process's.
        program: Its name in the usage.

    Returns:
        0. Every other exit code is a ``SystemExit``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print_help(program)
        return 0
    quiet_imports()
    # Here, because they take seconds that --help does not need.
    from diffnext.config.targets import ConfigError
    from diffnext.engine.control import (
        EXIT_STOPPED,
        EXIT_UNUSABLE,
        ProcessLost,
        TrainingError,
        TrainingStopped,
    )
    from diffnext.engine.training_run import train

    try:
        train(argv)
    except ConfigError as error:
        lines = [f"error: {problem}" for problem in error.problems]
        print_once(lines, patience=60, is_common=False)
        sys.exit(EXIT_UNUSABLE)
    except TrainingStopped as stopped:
        print_once([str(stopped)])
        sys.exit(EXIT_STOPPED)
    except ProcessLost as error:
        sys.exit(f"error: {error}")  # on every process: the main one may be the lost one
    except TrainingError as error:
        print_once([f"error: {error}"])
        sys.exit(1)
    return 0


def print_once(lines: Sequence[str], patience: float = 1, is_common: bool = True) -> None:
    """Print the message that all processes of a run have, on the main process only.

    Args:
        lines: What to print.
        patience: Seconds that the others wait. A launcher ends all processes with the first that
            ends, which should be the main one.
        is_common: Whether all processes have it for sure; if not, the others print it then.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(patience)
        if is_common:
            return
    text = "\n".join(lines)
    print(text, file=sys.stderr, flush=True)
    # PyTorch's launcher ends with a traceback of its own, and below it what this file says.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        report = {"message": text, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(report), encoding="utf-8")


def print_help(program: str) -> None:
    """Print usage and all keys."""
    from diffnext.config.schema import USAGE, TrainConfig, describe_schema

    print(USAGE.format(program=program))
    print(describe_schema(TrainConfig))
    if program == PROGRAM:
        print(LAUNCH)
