"""Two pictures, or two clips, and a NOVA that learns to draw them, on a CPU.

    python scripts/demo.py pictures --output demo
    python scripts/demo.py clips --output demo_video

It shows and runs the commands of TRAINING.md: `diffnext init --tiny` writes an untrained model,
`diffnext cache` turns pictures or clips into latents, `accelerate launch scripts/train.py` trains.
Run again, it continues. At the end it draws both captions with the averaged weights and writes
sheet.png: the originals, the same through the autoencoder (the best that a model on its latents
can do), and what was drawn. Of clips it shows every fourth frame, and it also draws what follows
the first frame of the first one (sheet_i2v.png).
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from numpy import ndarray
from PIL import Image

from diffnext.cli.parsing import command_parser
from diffnext.engine.validation import make_grid
from diffnext.image_processor import VaeImageProcessor
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.pipelines import NOVAPipeline
from diffnext.utils import export_to_image, export_to_video

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
TRANSFORMER = "pipeline.paths.module_config.transformer"
NUM_FRAMES = 17


def read_pictures(size: int) -> ndarray:
    """Both sample pictures, (2, 1, S, S, 3)."""
    names = ("sample_image.jpg", "sample_image2.jpg")
    pictures = [Image.open(ASSETS / name).convert("RGB") for name in names]
    return np.stack([[cut(picture, 0, picture.width, size)] for picture in pictures])


def read_clips(size: int) -> ndarray:
    """Every third frame of the sample video, and a pan over a sample picture, (2, F, S, S, 3)."""
    reader: Any = imageio.get_reader(ASSETS / "sample_video.mp4")
    with reader:
        video = [Image.fromarray(reader.get_data(3 * index)) for index in range(NUM_FRAMES)]
    left = (video[0].width - video[0].height) // 2
    balloon = [cut(frame, left, frame.height, size) for frame in video]
    picture = Image.open(ASSETS / "sample_image2.jpg").convert("RGB")
    side = picture.width * 5 // 8
    places = np.linspace(0, (picture.width - side) / 4, NUM_FRAMES)
    reef = [cut(picture, place, side, size, top=place) for place in places]
    return np.stack([balloon, reef])


def cut(picture: Image.Image, left: float, side: float, size: int, top: float = 0) -> ndarray:
    """A square part of a picture, scaled, (S, S, 3)."""
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box))


@dataclass(frozen=True)
class Demo:
    """What is learnt.

    Attributes:
        config: Name of the training config.
        kind: Sub-command of `diffnext cache`.
        read: Reads the originals at a size, (2, F, S, S, 3) of uint8.
        captions: Of the originals.
        size: Usual side in pixels.
        steps: Usual number of training steps.
        latent_frames: Of a drawing.
        cache: More options of `diffnext cache`.
        overrides: More arguments of the training.
        call: More arguments of the pipeline.
    """

    config: str
    kind: str
    read: Callable[[int], ndarray]
    captions: tuple[str, str]
    size: int
    steps: int
    latent_frames: int = 1
    cache: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)


DEMOS = {
    "pictures": Demo(
        config="nova_photos_t2i",
        kind="images",
        read=read_pictures,
        captions=("a mountain lake at sunset", "an orange fish above a coral reef"),
        size=256,
        steps=600,
        overrides=("training.batch_size=4",),
        call={"num_inference_steps": 32},
    ),
    "clips": Demo(
        config="nova_clips_t2v",
        kind="videos",
        read=read_clips,
        captions=("a red balloon rises above a lake", "a camera moves over a coral reef"),
        size=128,
        steps=1000,
        latent_frames=5,
        cache=("--num-frames", str(NUM_FRAMES), "--stride", "1", "--flow", "5"),
        call={"num_inference_steps": 16, "num_frames": NUM_FRAMES, "motion_flow": 5.0},
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Initialise, cache, train and draw."""
    args = parse_args(argv)
    demo = DEMOS[args.what]
    originals = demo.read(args.size)
    model, dataset = args.output / "untrained", args.output / "dataset"
    config = ROOT / "configs" / f"{demo.config}.yaml"
    if not model.exists():
        run("diffnext", "init", "--config", config, "--output", model, "--tiny")
    if not dataset.exists():
        source = write_source(originals, demo, args.output / "source")
        options = ["--output", dataset, "--vae", model / "vae", "--size", args.size, *demo.cache]
        run("diffnext", "cache", demo.kind, source, *options)
    run(*training_command(config, model, dataset, demo, args))
    draw(originals, demo, args)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("demo.py", __doc__)
    parser.add_argument("what", nargs="?", choices=DEMOS, default="pictures", help="(pictures)")
    parser.add_argument("--output", type=Path, help="folder to write (demo, of clips demo_video)")
    parser.add_argument("--size", type=int, help="side in pixels (256, of clips 128)")
    parser.add_argument("--steps", type=int, help="training steps (600, of clips 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings (0)")
    args = parser.parse_args(argv)
    demo = DEMOS[args.what]
    args.output = (
        args.output or Path("demo" if args.what == "pictures" else "demo_video")
    ).resolve()
    args.size = args.size or demo.size
    args.steps = args.steps or demo.steps
    return args


def run(program: str, *words: object) -> None:
    """Show a command and run it."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def write_source(originals: ndarray, demo: Demo, folder: Path) -> Path:
    """Write the originals as files with their captions beside them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (frames, caption) in enumerate(zip(originals, demo.captions, strict=True)):
        if demo.kind == "images":
            export_to_image(frames[0], folder / f"{index}.png")
        else:
            export_to_video(frames, folder / f"{index}.mp4")
        (folder / f"{index}.txt").write_text(caption)
    return folder


def training_command(
    config: Path, model: Path, dataset: Path, demo: Demo, args: argparse.Namespace
) -> list[str]:
    """The launch of a training of the config's model, at the demo's size."""
    tokens = args.size // 16
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    return [
        *("accelerate", "launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads, "scripts/train.py"),
        f"config={config}",
        f"pipeline.paths.pretrained_path={model}",
        f"experiment.output_dir={args.output / 'experiment'}",
        f"train_dataloader.params.dataset={dataset}",
        f"{TRANSFORMER}.image_size=[{args.size},{args.size}]",
        f"{TRANSFORMER}.image_base_size=[{tokens},{tokens}]",
        f"{TRANSFORMER}.video_base_size=[{demo.latent_frames},{tokens // 2},{tokens // 2}]",
        "wandb=null",
        "experiment.log_every=50",
        "experiment.save_every=200",
        f"training.max_train_steps={args.steps}",
        f"lr_scheduler.params.warmup_steps={min(20, args.steps // 2)}",
        *demo.overrides,
    ]


def draw(originals: ndarray, demo: Demo, args: argparse.Namespace) -> None:
    """Draw both captions, compare with both originals and write the files."""
    checkpoint = args.output / "experiment" / "ema_checkpoints" / f"checkpoint-{args.steps}"
    pipe = NOVAPipeline.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(args.seed)
    rebuilt = np.stack([reconstruct(pipe.vae, clip) for clip in originals])
    drawn = sample(pipe, demo, list(demo.captions), generator=generator)
    word = args.what.removesuffix("s")
    for index, caption in enumerate(demo.captions):
        own, other = (psnr(drawn[index], originals[place]) for place in (index, 1 - index))
        limit = psnr(rebuilt[index], originals[index])
        print(
            f"{caption!r}: {own:.1f} dB from its own {word}, {other:.1f} dB from the other "
            f"(autoencoder alone: {limit:.1f} dB)"
        )
    columns = np.stack([originals, rebuilt, drawn], axis=1)[:, :, ::4]  # (2, 3, F, S, S, 3)
    if args.what == "pictures":
        write_sheet(columns[:, :, 0], args.output / "sheet.png")
    else:
        write_sheet(columns.reshape(-1, *columns.shape[2:]), args.output / "sheet.png")
        for index, clip in enumerate(drawn):
            export_to_video(clip, args.output / f"{index}.mp4")
        continue_clip(pipe, originals[0], demo, generator, args.output / "sheet_i2v.png")
    print(f"\nWrote {args.output / 'sheet.png'}")


def continue_clip(
    pipe: NOVAPipeline, clip: ndarray, demo: Demo, generator: torch.Generator, sheet: Path
) -> None:
    """Draw what follows the first frame of a clip, (F, S, S, 3), below the clip itself."""
    image = Image.fromarray(clip[0])
    continued = sample(pipe, demo, demo.captions[0], image=image, generator=generator)[0]
    distance = psnr(continued[0], reconstruct(pipe.vae, clip[:1])[0])
    print(f"image to video: the first frame is {distance:.1f} dB from the given image")
    write_sheet(np.stack([clip, continued])[:, ::4], sheet)


def sample(pipe: NOVAPipeline, demo: Demo, prompts: str | list[str], **given: Any) -> ndarray:
    """Drawings of prompts, (B, F, S, S, 3) of uint8."""
    options = {**demo.call, **given, "guidance_scale": 2}
    drawn = pipe(prompts, output_type="np", return_dict=False, **options)[0]
    return drawn if drawn.ndim == 5 else drawn[:, None]


@torch.no_grad()
def reconstruct(vae: Any, frames: ndarray) -> ndarray:
    """Frames through the autoencoder, (F, S, S, 3)."""
    x = torch.from_numpy(frames).movedim(-1, 0)[None].float().sub(127.5).div(127.5)
    x = x.squeeze(2) if isinstance(vae, AutoencoderKL) else x
    pixels = vae.decode(vae.encode(x).latent_dist.mean).sample
    return VaeImageProcessor.pt_to_numpy(pixels).reshape(frames.shape)


def psnr(first: ndarray, second: ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(first.astype(np.float64) - second).mean()
    return 10 * math.log10(255**2 / max(error, 1e-6))


def write_sheet(pictures: ndarray, path: Path) -> None:
    """Write a sheet of pictures, (rows, columns, S, S, 3)."""
    Image.fromarray(make_grid(pictures[:, :, None])[0]).save(path)


if __name__ == "__main__":
    main()
