"""Make assets/nova-tiny from nothing: autoencoder, records, NOVA, scores.

    python scripts/make_nova_tiny.py --work nova_tiny --output assets/nova-tiny

Every stage is a command of this repository; it is shown, and skipped when its result is there. The
same command continues after an interruption. The time of each stage, all attempts together, is in
times.json of the work folder. The output holds the average of the weights (EMA), in float16.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo import ROOT, run
from omegaconf import OmegaConf

from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.release_folder import read_json, write_json

SCRIPTS = ROOT / "scripts"
AUTOENCODER_CONFIG = ROOT / "configs" / "autoencoder_shapes.yaml"
MODEL_CONFIG = ROOT / "configs" / "nova_shapes_t2i.yaml"
NUM_HELD_OUT_RECORDS = 512


@dataclass(frozen=True)
class Stage:
    """A command whose result is a file or folder.

    Attributes:
        name: In times.json.
        result: What the command leaves when it is through.
        command: Words of the command.
    """

    name: str
    result: Path
    command: Sequence[str | Path]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages."""
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in make_stages(args):
        if not stage.result.exists():
            run_stage(stage, args.work)
    if not args.output.exists():
        export(average_folder(args), args.output)
    scores = args.work / "scores"
    options = ["--model", args.output, "--output", scores, "--num", str(args.num_prompts)]
    command = [sys.executable, SCRIPTS / "evaluate_shapes.py", *options]
    run_stage(Stage("scores", scores / "scores.json", command), args.work)
    print(f"\nWrote {args.output}; hours by stage: {read_times(args.work)}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; paths become absolute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("nova_tiny"), help="(nova_tiny)")
    parser.add_argument("--output", type=Path, help="release folder to write (WORK/nova-tiny)")
    parser.add_argument("--num-records", type=int, default=60000, help="to train on (60000)")
    parser.add_argument("--autoencoder-steps", type=int, help="of its fit (those of the config)")
    parser.add_argument("--steps", type=int, help="of the training (those of the config)")
    parser.add_argument("--num-prompts", type=int, default=48, help="scored a category (48)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    args.output = (args.output or args.work / "nova-tiny").resolve()
    args.steps = args.steps or OmegaConf.load(MODEL_CONFIG).training.max_train_steps
    default = OmegaConf.load(AUTOENCODER_CONFIG).training.steps
    args.autoencoder_steps = args.autoencoder_steps or default
    return args


def make_stages(args: argparse.Namespace) -> list[Stage]:
    """Everything up to the trained model."""
    work, python = args.work, sys.executable
    vae = work / "autoencoder" / "vae"
    done = work / "autoencoder" / "done"
    base = work / "base"
    fit = [
        *(python, SCRIPTS / "train_autoencoder.py", f"config={AUTOENCODER_CONFIG}"),
        *(f"training.steps={args.autoencoder_steps}", f"training.seed={args.seed}"),
    ]
    render = [python, SCRIPTS / "make_shapes_dataset.py", "--vae", vae]
    initialize = [python, SCRIPTS / "init_checkpoint.py", "--config", MODEL_CONFIG, "--tiny"]
    numbers = {"records": args.num_records, "held_out_records": NUM_HELD_OUT_RECORDS}
    return [
        Stage("autoencoder", done, [*fit, f"output_dir={vae.parent}"]),
        *(
            Stage(
                name,
                work / name,
                [*render, "--output", work / name, "--num", str(number), "--seed", str(seed)],
            )
            for seed, (name, number) in enumerate(numbers.items())
        ),
        Stage(
            "base",
            base,
            [*initialize, "--vae", vae, "--output", base, "--seed", str(args.seed)],
        ),
        Stage("training", average_folder(args), train_command(args, base)),
    ]


def train_command(args: argparse.Namespace, base: Path) -> list[str | Path]:
    """The launch of scripts/train.py."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    return [
        *(Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads, SCRIPTS / "train.py"),
        f"config={MODEL_CONFIG}",
        f"pipeline.paths.pretrained_path={base}",
        f"experiment.output_dir={args.work / 'training'}",
        f"train_dataloader.params.dataset={args.work / 'records'}",
        f"validation.holdout={args.work / 'held_out_records'}",
        f"training.max_train_steps={args.steps}",
        f"training.seed={1337 + args.seed}",
    ]


def average_folder(args: argparse.Namespace) -> Path:
    """The checkpoint with the averaged weights of the last step."""
    return args.work / "training" / "ema_checkpoints" / f"checkpoint-{args.steps}"


def run_stage(stage: Stage, work: Path) -> None:
    """Run a command and add its time to times.json, also when it is cut short."""
    begin = time.monotonic()
    try:
        run(list(stage.command))
        if stage.result.name == "done":
            stage.result.touch()
    finally:
        times = read_times(work)
        hours = times.get(stage.name, 0) + (time.monotonic() - begin) / 3600
        write_json(work / "times.json", {**times, stage.name: round(hours, 4)})


def read_times(work: Path) -> dict[str, float]:
    """Hours by stage."""
    path = work / "times.json"
    return read_json(path) if path.exists() else {}


def export(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as a release folder of its own in float16."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    NOVAPipeline.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(partial)
    partial.rename(output)


if __name__ == "__main__":
    main()
