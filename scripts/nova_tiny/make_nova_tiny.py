"""Make assets/nova-tiny and assets/nova-tiny-video from nothing: data, autoencoders, NOVA, scores.

    python scripts/nova_tiny/make_nova_tiny.py --work nova_tiny
    python scripts/nova_tiny/make_nova_tiny.py --work try --scale 0.1 --seed 1 --only nova-tiny

Every stage is a command of this repository; it is shown, and skipped if its result is there. The
same command continues after an interruption. NOVA learns pictures in three lessons: what words
say, all kinds, and that any shape can have any colour. The model of clips starts from the weights
of the model of pictures. The work folder receives

    nova-tiny/, nova-tiny-video/  release folders: the average of the weights (EMA), in float16
    *_scores/                     scores.json, scores.md and a sheet of pictures of each
    times.json                    hours per stage, all attempts together
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from diffnext.cli.parsing import command_parser
from diffnext.pipelines import NOVAPipeline
from diffnext.utils.json_files import read_json, write_json
from shapes_world.scenes import CATEGORIES, CLIP_CATEGORIES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EARLIER_VIDEO_AUTOENCODER = ROOT / "assets" / "nova-tiny-video" / "vae"
CONFIGS = ROOT / "configs"
IMAGE_AUTOENCODER_CONFIG = CONFIGS / "autoencoder_shapes.yaml"
VIDEO_AUTOENCODER_CONFIG = CONFIGS / "autoencoder_shapes_video.yaml"
IMAGE_MODEL_CONFIG = CONFIGS / "nova_shapes_t2i.yaml"
VIDEO_MODEL_CONFIG = CONFIGS / "nova_shapes_t2v.yaml"


@dataclass(frozen=True)
class Lesson:
    """What the model is trained on for a while, starting with what it has learnt before.

    Attributes:
        name: In the names of folders.
        categories: Kinds of pictures; a kind that is named twice is twice as frequent.
        num_records: New pictures, or clips.
        steps: Of training.
        is_clip: Whether the examples are clips.
        rates: Learning rates at its peak and at its end; default: the config's.
        repeats: Whether it uses the records of the lesson before as well.
        hides_all: Whether all tokens are hidden in every step, so that only words explain a
            picture; else as many as the config says.
        more_shapes: Whether half of the shapes in new examples are others than those of
            evaluations.
    """

    name: str
    categories: Sequence[str]
    num_records: int
    steps: int
    is_clip: bool = False
    rates: tuple[float, float] | None = None
    repeats: bool = False
    hides_all: bool = False
    more_shapes: bool = False


# Words are learnt where only they explain a picture: with everything hidden, from pictures whose
# captions say most. Otherwise the model first learns from neighbouring tokens.
NAMED_COLORS = ("colors", "attribution", "attribution", "position")
ALL_KINDS = (*CATEGORIES, "colors", "attribution")
COUNTED_AND_COLORED = (*CATEGORIES, "counting", "colors", "attribution")
COLORED_CLIPS = ("single", "two", "colors", "colors", "attribution", "attribution")
PICTURE_LESSONS = (
    Lesson("named_colors", NAMED_COLORS, 80000, 1250, hides_all=True),
    Lesson("all_kinds", ALL_KINDS, 200000, 24000),
    Lesson("more_shapes", COUNTED_AND_COLORED, 50000, 5000, rates=(7e-4, 1e-5), more_shapes=True),
)
CLIP_LESSONS = (
    Lesson("clips", COLORED_CLIPS, 10000, 3000, is_clip=True, rates=(1e-3, 5e-4)),
    Lesson("more_clips", COLORED_CLIPS, 16000, 11500, is_clip=True, repeats=True),
    Lesson("same_clips", (), 0, 3400, is_clip=True, rates=(5e-4, 1e-5), repeats=True),
    Lesson("new_clips", COLORED_CLIPS, 16000, 6000, is_clip=True, rates=(7e-4, 1e-5), repeats=True),
    Lesson(
        *("clips_of_more_shapes", COLORED_CLIPS, 12000, 5000),
        is_clip=True,
        rates=(7e-4, 1e-5),
        repeats=True,
        more_shapes=True,
    ),
)
CLIP_DECODER_STEPS = 1400  # of one clip
HELD_OUT_PICTURES = Lesson("held_out", CATEGORIES, 512, steps=0)
HELD_OUT_CLIPS = Lesson("held_out_clips", CLIP_CATEGORIES, 64, steps=0, is_clip=True)
PRODUCTS = ("nova-tiny", "nova-tiny-video")

CPU = torch.cpu.get_capabilities()
HAS_BF16 = bool(torch.cuda.is_available() or CPU.get("amx_bf16") or CPU.get("avx512_bf16"))
PRECISION = "bf16" if HAS_BF16 else "no"  # where it is emulated, it takes twice the time of float32


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
    command: Sequence[object]


def main(argv: Sequence[str] | None = None) -> None:
    """Make each product whose folder is not there, and score it."""
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for product in args.only or PRODUCTS:
        output = args.work / product
        is_video = product == "nova-tiny-video"
        if not output.exists():
            stages = make_clip_stages(args) if is_video else make_picture_stages(args)
            for stage in stages:
                if not stage.result.exists():
                    run_stage(stage, args.work)
            last = stages[-1].result
            export(last.parents[1] / "ema_checkpoints" / last.name, output)
        score_release(args, output, is_video)
        print(f"\nWrote {output}; hours by stage: {read_times(args.work)}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; paths become absolute."""
    parser = command_parser("make_nova_tiny.py", __doc__)
    add = parser.add_argument
    add("--work", type=Path, default=Path("nova_tiny"), help="(nova_tiny)")
    add("--only", nargs="+", choices=PRODUCTS, help="make these only (both)")
    add("--scale", type=float, default=1.0, help="of all steps and records; 0.1 for a try (1)")
    add("--num-prompts", type=int, default=48, help="scored per category (48)")
    add("--seed", type=int, default=0, help="of weights, data and order (0)")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    return args


def make_picture_stages(args: argparse.Namespace) -> list[Stage]:
    """Everything up to the trained model of pictures."""
    base = args.work / "base"
    return [
        fit_stage(args, "autoencoder", IMAGE_AUTOENCODER_CONFIG),
        text_stage(args),
        render_stage(args, HELD_OUT_PICTURES, seed=0),
        initialize_stage(args, base, IMAGE_MODEL_CONFIG, "autoencoder", ["--branch-gain", "0"]),
        *lesson_stages(args, PICTURE_LESSONS, base, first_seed=1),
    ]


def make_clip_stages(args: argparse.Namespace) -> list[Stage]:
    """Everything up to the trained model of clips, which starts from the model of pictures.

    Its autoencoder is the one in assets/, which learns the latents of the model of pictures; its
    decoder then learns only moving shapes for a while.
    """
    before = make_picture_stages(args)
    pictures, base = before[-1].result, args.work / "clip_base"
    overrides = [f"init_from={EARLIER_VIDEO_AUTOENCODER}"]
    overrides += [f"align_with={args.work / 'autoencoder' / 'vae'}", "optimizer.learning_rate=5e-4"]
    fit = fit_stage(args, "clip_autoencoder", VIDEO_AUTOENCODER_CONFIG, overrides)
    overrides = [f"init_from={fit.result.parent / 'vae'}", "training.part=decoder"]
    overrides += ["training.batch_size=1", "data.clip_lengths=[17]", "optimizer.learning_rate=5e-4"]
    overrides.append(f"training.steps={scaled(CLIP_DECODER_STEPS, args)}")
    refine = fit_stage(args, "clip_decoder", VIDEO_AUTOENCODER_CONFIG, overrides)
    options = ["--weights", pictures]
    return [
        *(*before, fit, refine),
        render_stage(args, HELD_OUT_CLIPS, seed=100),
        initialize_stage(args, base, VIDEO_MODEL_CONFIG, "clip_decoder", options),
        *lesson_stages(args, CLIP_LESSONS, base, first_seed=101),
    ]


def lesson_stages(
    args: argparse.Namespace, lessons: Sequence[Lesson], base: Path, first_seed: int
) -> list[Stage]:
    """Records and training of each lesson; each starts from the weights of the one before."""
    stages: list[Stage] = []
    records: list[Path] = []
    for index, lesson in enumerate(lessons):
        records = records if lesson.repeats else []
        if lesson.num_records:
            stages.append(render_stage(args, lesson, first_seed + index))
            records = [*records, stages[-1].result]
        stages.append(train_stage(args, lesson, base, records))
        base = stages[-1].result
    return stages


def fit_stage(
    args: argparse.Namespace, name: str, config: Path, overrides: Sequence[str] = ()
) -> Stage:
    """Fit an autoencoder; the script leaves no mark at the end, so the stage does."""
    output = args.work / name
    steps = scaled(OmegaConf.load(config).training.steps, args)
    settings = [f"config={config}", f"training.steps={steps}", f"training.seed={args.seed}"]
    settings += [f"training.mixed_precision={PRECISION}", f"output_dir={output}"]
    command = script("train_autoencoder", *settings, *overrides)
    return Stage(name, output / "done", command)


def text_stage(args: argparse.Namespace) -> Stage:
    """Fit the text encoder."""
    output = args.work / "text"
    transformer = OmegaConf.load(IMAGE_MODEL_CONFIG).pipeline.paths.module_config.transformer
    sizes = ["--width", transformer.text_token_dim, "--steps", scaled(2500, args)]
    command = script("train_text_encoder", "--output", output, *sizes, "--seed", args.seed)
    return Stage("text", output, command)


def initialize_stage(
    args: argparse.Namespace, output: Path, config: Path, autoencoder: str, options: Sequence[Any]
) -> Stage:
    """Put the untrained model together."""
    text = args.work / "text"
    command = [
        *(sys.executable, "-m", "diffnext", "init", "--config", config, "--output", output),
        *("--vae", args.work / autoencoder / "vae", "--seed", args.seed, "--shift", "1.5"),
        *("--text-encoder", text / "text_encoder", "--tokenizer", text / "tokenizer"),
        *options,
    ]
    return Stage(output.name, output, command)


def render_stage(args: argparse.Namespace, lesson: Lesson, seed: int) -> Stage:
    """Render and encode the pictures, or every fourth frame of the clips, of a lesson."""
    output = args.work / f"{lesson.name}_records"
    command = script(
        *("make_shapes_dataset", "--output", output, "--vae", args.work / "autoencoder" / "vae"),
        *("--seed", 1000 * args.seed + seed, "--num", scaled(lesson.num_records, args)),
        *("--categories", *lesson.categories),
        *(["--bf16"] if HAS_BF16 else []),
        *(["--clips"] if lesson.is_clip else []),
        *(["--more-shapes"] if lesson.more_shapes else []),
    )
    return Stage(output.name, output, command)


def train_stage(
    args: argparse.Namespace, lesson: Lesson, pretrained: Path, records: Sequence[Path]
) -> Stage:
    """Launch scripts/train.py on a lesson; its result is the last checkpoint."""
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1
    steps = scaled(lesson.steps, args)
    output = args.work / f"{lesson.name}_training"
    keys = ("optimizer.params.lr", "lr_scheduler.params.lr_min")
    rates = [f"{key}={rate}" for key, rate in zip(keys, lesson.rates or (), strict=False)]
    held_out = HELD_OUT_CLIPS if lesson.is_clip else HELD_OUT_PICTURES
    command = [
        *(Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1"),
        *("--num_machines", "1", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads, ROOT / "scripts" / "train.py"),
        f"config={VIDEO_MODEL_CONFIG if lesson.is_clip else IMAGE_MODEL_CONFIG}",
        f"pipeline.paths.pretrained_path={pretrained}",
        f"experiment.output_dir={output}",
        f"train_dataloader.params.dataset=[{','.join(map(str, records))}]",
        f"validation.holdout={args.work / f'{held_out.name}_records'}",
        f"training.max_train_steps={steps}",
        f"lr_scheduler.params.warmup_steps={min(200, steps // 10)}",
        f"training.seed={1337 + args.seed}",
        f"training.mixed_precision={PRECISION}",
        *rates,
        *(["model.mask_ratios=[0.98,1.0,0.4]"] if lesson.hides_all else []),
    ]
    return Stage(output.name, output / "checkpoints" / f"checkpoint-{steps}", command)


def script(name: str, *words: object) -> list[object]:
    """The command of a script beside this one."""
    return [sys.executable, HERE / f"{name}.py", *words]


def score_release(args: argparse.Namespace, output: Path, is_video: bool) -> None:
    """Score a product; the scores are also put into its folder.

    Clips are also scored when they continue a picture, and the first five frames of a clip, without
    guidance, as the given frames say more than the prompt.
    """
    for given_frames in (0, 1, 5) if is_video else (0,):
        suffix = f"_given_{given_frames}" if given_frames else ""
        scores = args.work / f"{output.name}_scores{suffix}"
        command = script(
            *("evaluate_shapes", "--model", output, "--output", scores),
            *("--num", args.num_prompts),
            *(["--clips", "--given-frames", given_frames] if is_video else []),
            *(["--guidance-scale", "1"] if given_frames else []),
        )
        run_stage(Stage(scores.name, scores, command), args.work)
        shutil.copy(scores / "scores.json", output / f"scores{suffix}.json")


def scaled(number: int, args: argparse.Namespace) -> int:
    """A number of steps or records of this run."""
    return max(round(args.scale * number), 1)


def run_stage(stage: Stage, work: Path) -> None:
    """Run a command and add its time to times.json, also when it is cut short."""
    begin = time.monotonic()
    try:
        show_and_run(stage.command)
        if stage.result.name == "done":
            stage.result.touch()
    finally:
        times = read_times(work)
        hours = times.get(stage.name, 0) + (time.monotonic() - begin) / 3600
        write_json(work / "times.json", {**times, stage.name: round(hours, 4)})


def show_and_run(command: Sequence[object]) -> None:
    """Print a command and run it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run(words, check=True, cwd=ROOT)


def read_times(work: Path) -> dict[str, float]:
    """Hours by stage."""
    path = work / "times.json"
    return read_json(path) if path.exists() else {}


def export(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as a complete release folder in float16."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    NOVAPipeline.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(partial)
    drop_unused_weights(partial / "text_encoder" / "model.safetensors")
    for path in (partial / "model_index.json", *partial.glob("*/config.json")):
        config = read_json(path)
        config.pop("_name_or_path", None)  # where it was trained
        write_json(path, config)
    partial.rename(output)


def drop_unused_weights(path: Path) -> None:
    """Leave out the text encoder's language-modelling head, which nothing reads."""
    weights = {n: w for n, w in load_file(path).items() if not n.startswith("lm_head.")}
    save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
