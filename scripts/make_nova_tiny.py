"""Make assets/nova-tiny from nothing: autoencoder, records, NOVA, scores.

    python scripts/make_nova_tiny.py --work nova_tiny --output assets/nova-tiny

Every stage is a command of this repository; it is shown, and skipped when its result is there. The
same command continues after an interruption. NOVA learns in lessons, from shapes in a few fixed
places to shapes anywhere. The time of each stage, all attempts together, is in times.json of
the work folder. The output holds the average of the weights (EMA), in float16.
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
from shapes_world.scenes import CATEGORIES

from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.release_folder import read_json, write_json

SCRIPTS = ROOT / "scripts"
AUTOENCODER_CONFIG = ROOT / "configs" / "autoencoder_shapes.yaml"
MODEL_CONFIG = ROOT / "configs" / "nova_shapes_t2i.yaml"
NUM_HELD_OUT_RECORDS = 512


@dataclass(frozen=True)
class Lesson:
    """What the model is trained on for a while, starting with what it learnt before.

    Attributes:
        name: In the names of folders.
        categories: Kinds of pictures; a kind that is named twice is twice as frequent.
        num_records: Pictures.
        steps: Of training.
        is_centered: Whether shapes stand in the same places in every picture.
    """

    name: str
    categories: Sequence[str]
    num_records: int
    steps: int
    is_centered: bool = False


# Words are learnt where they explain most of a picture: in thousands of steps less than from
# pictures in which shapes, of any colour, may be anywhere.
LESSONS = (
    Lesson("centered", CATEGORIES, 16000, 5000, is_centered=True),
    Lesson("all", CATEGORIES, 40000, 24000),
)


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
    stages = make_stages(args)
    for stage in stages:
        if not stage.result.exists():
            run_stage(stage, args.work)
    if not args.output.exists():
        export(stages[-1].result, args.output)
    scores = args.work / "scores"
    options = ["--model", args.output, "--output", scores, "--num", str(args.num_prompts)]
    command = [sys.executable, SCRIPTS / "evaluate_shapes.py", *options]
    run_stage(Stage("scores", scores / "scores.json", command), args.work)
    shutil.copy(scores / "scores.json", args.output)
    print(f"\nWrote {args.output}; hours by stage: {read_times(args.work)}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; paths become absolute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("nova_tiny"), help="(nova_tiny)")
    parser.add_argument("--output", type=Path, help="release folder to write (WORK/nova-tiny)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all steps and records; 0.1 for a try (1)"
    )
    parser.add_argument("--num-prompts", type=int, default=48, help="scored a category (48)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order (0)")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    args.output = (args.output or args.work / "nova-tiny").resolve()
    return args


def make_stages(args: argparse.Namespace) -> list[Stage]:
    """Everything up to the trained model."""
    work, python = args.work, sys.executable
    vae, base = work / "autoencoder" / "vae", work / "base"
    steps = scaled(OmegaConf.load(AUTOENCODER_CONFIG).training.steps, args)
    fit = [
        *(python, SCRIPTS / "train_autoencoder.py", f"config={AUTOENCODER_CONFIG}"),
        *(f"training.steps={steps}", f"training.seed={args.seed}", f"output_dir={vae.parent}"),
    ]
    initialize = [
        *(python, SCRIPTS / "init_checkpoint.py", "--config", MODEL_CONFIG, "--tiny"),
        *("--vae", vae, "--output", base, "--seed", str(args.seed)),
        *("--branch-gain", "0", "--shift", "3"),
    ]
    held_out = Lesson("held_out", CATEGORIES, NUM_HELD_OUT_RECORDS, steps=0)
    stages = [
        Stage("autoencoder", vae.parent / "done", fit),
        render_stage(args, held_out, seed=1000 * args.seed),
        Stage("base", base, initialize),
    ]
    for index, lesson in enumerate(LESSONS, start=1):
        pretrained = base if index == 1 else stages[-1].result
        stages.append(render_stage(args, lesson, seed=1000 * args.seed + index))
        stages.append(train_stage(args, lesson, pretrained))
    return stages


def render_stage(args: argparse.Namespace, lesson: Lesson, seed: int) -> Stage:
    """Render and encode the pictures of a lesson."""
    output = args.work / f"{lesson.name}_records"
    command = [
        *(sys.executable, SCRIPTS / "make_shapes_dataset.py", "--output", output),
        *("--vae", args.work / "autoencoder" / "vae", "--seed", str(seed)),
        *("--num", str(scaled(lesson.num_records, args)), "--categories", *lesson.categories),
        *(["--centered"] if lesson.is_centered else []),
    ]
    return Stage(output.name, output, command)


def train_stage(args: argparse.Namespace, lesson: Lesson, pretrained: Path) -> Stage:
    """Launch scripts/train.py on a lesson; its result is the average of the weights."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    steps = scaled(lesson.steps, args)
    output = args.work / f"{lesson.name}_training"
    command = [
        *(Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads, SCRIPTS / "train.py"),
        f"config={MODEL_CONFIG}",
        f"pipeline.paths.pretrained_path={pretrained}",
        f"experiment.output_dir={output}",
        f"train_dataloader.params.dataset={args.work / f'{lesson.name}_records'}",
        f"validation.holdout={args.work / 'held_out_records'}",
        f"training.max_train_steps={steps}",
        f"lr_scheduler.params.warmup_steps={min(200, steps // 10)}",
        f"training.seed={1337 + args.seed}",
    ]
    return Stage(output.name, output / "ema_checkpoints" / f"checkpoint-{steps}", command)


def scaled(number: int, args: argparse.Namespace) -> int:
    """A number of steps or records of this run."""
    return max(round(args.scale * number), 1)


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
