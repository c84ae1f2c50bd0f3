"""From two pictures to a NOVA that draws them, on a CPU, through the commands of TRAINING.md.

    python scripts/demo.py --output demo

1. writes a release folder with fresh weights (diffnext init --tiny),
2. caches the two pictures of assets/ as autoencoder latents with two captions,
3. trains with `accelerate launch scripts/train.py`; run again, it continues,
4. draws both captions with the averaged weights and writes a sheet beside the originals.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import codewithgpu
import numpy as np
import torch
from PIL import Image, ImageDraw

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.pipelines import NOVAPipeline

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "nova_tiny_t2i.yaml"
TRANSFORMER = "pipeline.paths.module_config.transformer"


@dataclass(frozen=True)
class Sample:
    """A picture and the prompt it is to be drawn from."""

    path: Path
    caption: str


SAMPLES = (
    Sample(ROOT / "assets" / "sample_image.jpg", "a mountain lake at sunset"),
    Sample(ROOT / "assets" / "sample_image2.jpg", "an orange fish above a coral reef"),
)


def make_parser(description: str, output: str, size: int, steps: int) -> argparse.ArgumentParser:
    """The options of a demo, with its defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder to write")
    parser.add_argument("--size", type=int, default=size, help=f"side of the pictures ({size})")
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps ({steps})")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run all four stages."""
    args = make_parser(__doc__, output="demo", size=256, steps=500).parse_args(argv)
    model_dir = args.output / "nova-tiny"
    dataset = args.output / "img_dataset"
    experiment = args.output / "experiment"
    args.output.mkdir(parents=True, exist_ok=True)
    init_model(CONFIG, model_dir)
    pictures = [load_picture(sample.path, args.size) for sample in SAMPLES]
    if not (dataset / "METADATA").exists():
        cache_pictures(pictures, model_dir / "vae", dataset)
    tokens = args.size // 16
    train(
        CONFIG,
        model_dir,
        dataset,
        experiment,
        args,
        f"{TRANSFORMER}.video_base_size=[1,{tokens // 2},{tokens // 2}]",
        "training.batch_size=4",
    )
    draw(pictures, experiment / "ema_checkpoints" / f"checkpoint-{args.steps}", args)


def run(command: list[str | Path]) -> None:
    """Show a command and run it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run(words, check=True, cwd=ROOT)


def load_picture(path: Path, size: int) -> Image.Image:
    """A square picture."""
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def cache_pictures(pictures: list[Image.Image], vae_dir: Path, dataset: Path) -> None:
    """Write the latents' moments as TRAINING.md does."""
    vae = AutoencoderKL.from_pretrained(vae_dir).float().eval()
    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
    dataset.mkdir(parents=True, exist_ok=True)
    writer = codewithgpu.RecordWriter(str(dataset), features)
    for sample, picture in zip(SAMPLES, pictures, strict=True):
        x = torch.as_tensor(np.array(picture)[None].transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            moments = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters[0].half()
        example = {"caption": sample.caption, "text": sample.caption}
        content = moments.numpy().tobytes()
        writer.write({"shape": tuple(moments.shape), "moments": content, **example})
    writer.close()
    print(f"\nCached {len(pictures)} pictures in {dataset}")


def init_model(config: Path, model_dir: Path) -> None:
    """Write a release folder with fresh weights, unless it is there."""
    if not model_dir.exists():
        options = ["--config", config, "--output", model_dir, "--tiny"]
        run([sys.executable, "-m", "diffnext", "init", *options])


def train(
    config: Path,
    model_dir: Path,
    dataset: Path,
    experiment: Path,
    args: argparse.Namespace,
    *overrides: str,
) -> None:
    """Train the config's model, at the demo's size."""
    tokens = args.size // 16
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    run(
        [
            *(Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", threads, ROOT / "scripts" / "train.py"),
            f"config={config}",
            f"pipeline.paths.pretrained_path={model_dir.resolve()}",
            f"experiment.output_dir={experiment.resolve()}",
            f"train_dataloader.params.dataset={dataset.resolve()}",
            f"{TRANSFORMER}.image_size=[{args.size},{args.size}]",
            f"{TRANSFORMER}.image_base_size=[{tokens},{tokens}]",
            "wandb=null",
            "experiment.log_every=50",
            "experiment.save_every=200",
            f"training.max_train_steps={args.steps}",
            *overrides,
        ]
    )


def draw(pictures: list[Image.Image], checkpoint: Path, args: argparse.Namespace) -> None:
    """Draw both captions, compare them with both pictures and write the sheet."""
    pipe = NOVAPipeline.from_pretrained(checkpoint)
    drawn = pipe(
        [sample.caption for sample in SAMPLES],
        num_inference_steps=32,
        guidance_scale=2,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    rebuilt = [reconstruct(pipe.vae, picture) for picture in pictures]
    for index, sample in enumerate(SAMPLES):
        own = psnr(drawn[index], rebuilt[index])
        other = psnr(drawn[index], rebuilt[1 - index])
        print(
            f"{sample.caption!r}: {own:.1f} dB from its own picture, {other:.1f} dB from the "
            f"other (autoencoder alone: {psnr(rebuilt[index], pictures[index]):.1f} dB)"
        )
    sheet = args.output / "sheet.png"
    make_sheet(pictures, rebuilt, drawn).save(sheet)
    print(f"\nWrote {sheet}: originals, autoencoder, drawn from the caption")


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    """The picture through the autoencoder: the best that any model on its latents can draw."""
    x = torch.as_tensor(np.array(picture)).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample[0]
    array = (y * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size."""
    error = np.square(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-6))


def make_sheet(*columns: list[Image.Image]) -> Image.Image:
    """One row a caption, which stands below its pictures."""
    size = columns[0][0].width
    gap, line = 8, 24
    width = len(columns) * (size + gap) + gap
    height = len(SAMPLES) * (size + line + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, sample in enumerate(SAMPLES):
        top = gap + row * (size + line + gap)
        for column, pictures in enumerate(columns):
            sheet.paste(pictures[row], (gap + column * (size + gap), top))
        pen.text((gap, top + size + 4), sample.caption, fill="black")
    return sheet


if __name__ == "__main__":
    main()
