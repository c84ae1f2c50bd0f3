"""``diffnext train``, and ``scripts/train.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

PROGRAM = "diffnext train"
LAUNCH = """
On several devices or machines, a launcher starts the same command:
  accelerate launch --config_file accelerate_configs/8_gpus_ddp.yaml -m diffnext train config=...
  torchrun --nproc_per_node 2 -m diffnext train config=...

Example:
  diffnext train config=configs/nova_d48w1024_sdxl1024.yaml experiment.output_dir=runs/first \\
    pipeline.paths.pretrained_path=BASE train_dataloader.params.dataset=DATASET

Exit codes: 0 finished, 1 an error, 75 stopped by a signal or a time limit: run it again to go on.
"""


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
        program: As its usage names it.

    Returns:
        0. All else leaves by ``SystemExit``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print_help(program)
        return 0
    # Here, because they take seconds that --help does not need.
    from diffnext.data.records import RecordError
    from diffnext.engine.control import EXIT_STOPPED, TrainingError, TrainingStopped
    from diffnext.engine.training_run import train
    from diffnext.utils.omegaconf_utils import ConfigError, get_config

    try:
        train(get_config(argv))
    except TrainingStopped as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except (ConfigError, RecordError, TrainingError) as error:
        sys.exit(f"error: {error}")
    return 0


def print_help(program: str) -> None:
    """Print usage and all keys."""
    from diffnext.utils.config_schema import USAGE, TrainConfig, describe_schema

    print(USAGE.format(program=program))
    print(describe_schema(TrainConfig))
    if program == PROGRAM:
        print(LAUNCH)
