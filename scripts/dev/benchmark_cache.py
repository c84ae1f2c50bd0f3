"""Measure the cache builder against the loop of TRAINING.md, side by side.

    python scripts/dev/benchmark_cache.py images --vae assets/vae-tiny --size 256 --num 64
    python scripts/dev/benchmark_cache.py videos --vae assets/vae-tiny-video --size 64x96 --num 8

Renders JPEGs or MP4s, then lets the two take turns on them, and prints the median rates, their
span and the ratio, by the clock and by the processor seconds of all threads; on a machine that is
busy with other work only the second tells much. The loop is that of the guide over several files:
pictures, which the guide takes to have the right size, are scaled and cut as the builder does it.
Both sides have their autoencoder loaded before the clock runs, and both write records. The builder
also checks, resumes and measures the motion of clips; `--flow 5` leaves the last out, as the guide
does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from diffnext.data.caching import encoding
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.settings import (
    USUAL_BATCH_SIZES,
    CacheSettings,
    FrameSampling,
    parse_size,
)
from diffnext.data.records import RecordDataset, RecordWriter
from diffnext.models.autoencoders.loading import load_autoencoder
from diffnext.utils.export_utils import export_to_video

FEATURES = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
CLOCKS = {"second": time.perf_counter, "processor second": time.process_time}
CAPTIONS = {"caption": "long caption", "text": "short text"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        render_pictures(args, source) if args.kind == "images" else render_videos(args, source)
        vae = load_autoencoder(args.vae, getattr(torch, args.dtype), args.device)
        encoding.load_autoencoder = lambda *arguments: vae  # both sides use one
        sides = {
            "guide": lambda output: run_guide(args, vae, source, output),
            "builder": lambda output: run_builder(args, source, output),
        }
        turns = take_turns(sides, Path(folder), args)
    report(args, turns)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("images", "videos"))
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--size", required=True, help="SIDE or HEIGHTxWIDTH of the latents' pixels")
    parser.add_argument("--source-size", help="of the files (1.5 times as high and as wide)")
    parser.add_argument("--num", type=int, default=32, help="files (32)")
    parser.add_argument("--num-frames", type=int, default=17, help="frames of a clip (17)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument(
        "--batch-size", type=int, help="of the builder (8, of videos 1, as `diffnext cache` has it)"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads of the builder (2)")
    parser.add_argument("--flow", type=float, help="motion strength (the builder measures it)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--dtype", default="float32", help="of the autoencoder (float32)")
    parser.add_argument("--json", type=Path, help="file for the rates")
    args = parser.parse_args(argv)
    args.size = parse_size(args.size)
    larger = tuple(side * 3 // 2 // 2 * 2 for side in args.size)
    args.source_size = parse_size(args.source_size) if args.source_size else larger
    return args


def random_picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture of soft colours, (height, width)."""
    colors = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size[::-1], Image.Resampling.BICUBIC)


def render_pictures(args: argparse.Namespace, folder: Path) -> None:
    """JPEGs with captions."""
    for number in range(args.num):
        picture = random_picture(number, args.source_size)
        picture.save(folder / f"{number:05d}.jpg", quality=92)
        write_caption(folder / f"{number:05d}.json")


def render_videos(args: argparse.Namespace, folder: Path) -> None:
    """MP4s of moving pictures, with twice the frames that a clip takes."""
    for number in range(args.num):
        picture = np.asarray(random_picture(number, args.source_size))
        frames = [np.roll(picture, 2 * shift, axis=1) for shift in range(2 * args.num_frames)]
        path = folder / f"{number:05d}.mp4"
        export_to_video(frames, path, fps=30)
        write_caption(path.with_suffix(".json"))


def write_caption(path: Path) -> None:
    """Captions beside a file."""
    path.write_text(json.dumps(CAPTIONS))


def run_builder(args: argparse.Namespace, source: Path, output: Path) -> int:
    """Build with the cache builder; returns the number of examples."""
    settings = CacheSettings(
        kind=args.kind,
        source=str(source),
        output=output,
        vae=args.vae,
        sizes=(args.size,),
        frames=FrameSampling(num_frames=args.num_frames, stride=2),
        flow=args.flow,
        batch_size=args.batch_size or USUAL_BATCH_SIZES[args.kind],
        workers=args.workers,
        dtype=args.dtype,
        device=args.device,
    )
    return build_cache(settings).examples


def run_guide(args: argparse.Namespace, vae: Any, source: Path, output: Path) -> int:
    """Build with the guide's loop; returns the number of examples."""
    output.mkdir()
    flow = {"flow": "float64"} if args.kind == "videos" else {}
    read = guide_picture if args.kind == "images" else guide_clip
    pattern = "*.jpg" if args.kind == "images" else "*.mp4"
    with RecordWriter(output, {**FEATURES, **flow}) as writer:
        for path in sorted(source.glob(pattern)):
            pixels = read(args, path)
            x = torch.as_tensor(pixels).to(vae.device).to(vae.dtype)
            with torch.no_grad():
                x = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters
            x = x.half().cpu().numpy()[0]
            values = {"flow": 5.0} if flow else {}
            writer.write({"shape": x.shape, "moments": x.tobytes(), **CAPTIONS, **values})
    with RecordDataset(output) as dataset:
        return len(dataset)


def guide_picture(args: argparse.Namespace, path: Path) -> np.ndarray:
    """A picture as the guide reads it, scaled and cut: (1, 3, H, W)."""
    height, width = args.size
    picture = ImageOps.fit(Image.open(path), (width, height), Image.Resampling.LANCZOS)
    return np.array(picture)[None].transpose(0, 3, 1, 2)


def guide_clip(args: argparse.Namespace, path: Path) -> np.ndarray:
    """A clip as the guide reads it: (1, 3, F, H, W)."""
    import decord

    crop_h, crop_w = args.size
    frame_ids = list(range(0, 2 * args.num_frames - 1, 2))
    h, w = decord.VideoReader(str(path))[0].shape[:2]
    scale = max(crop_h / h, crop_w / w)
    h, w = int(h * scale + 0.5), int(w * scale + 0.5)
    video = decord.VideoReader(str(path), height=h, width=w)
    frames = video.get_batch(frame_ids).asnumpy()
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    frames = frames[:, top : top + crop_h, left : left + crop_w]
    return frames[None].transpose(0, 4, 1, 2, 3)


def take_turns(
    sides: dict[str, Callable[[Path], int]], folder: Path, args: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Files a second of each side in each round, after one round that does not count.

    Returns:
        Rates by clock and by side.
    """
    rates: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in sides} for clock in CLOCKS
    }
    for turn in range(args.rounds + 1):
        for name, run in sides.items():
            starts = {clock: read() for clock, read in CLOCKS.items()}
            count = run(folder / f"{name}_{turn}")
            seconds = {clock: read() - starts[clock] for clock, read in CLOCKS.items()}
            if count != args.num:
                raise RuntimeError(f"{name} wrote {count} of {args.num} examples")
            if turn:
                for clock, value in seconds.items():
                    rates[clock][name].append(count / value)
    return rates


def report(args: argparse.Namespace, rates: dict[str, dict[str, list[float]]]) -> None:
    """Print a table, and write the numbers if asked to."""
    print(f"| {args.kind} | median | span | builder / guide | span |\n|---|---|---|---|---|")
    for clock, sides in rates.items():
        ratios = [b / g for b, g in zip(sides["builder"], sides["guide"], strict=True)]
        for name, values in sides.items():
            row = f"| {name}, a {clock} | {statistics.median(values):.2f} | {_span(values)} |"
            last = f" {statistics.median(ratios):.2f} | {_span(ratios)} |"
            print(row + (last if name == "builder" else " | |"))
    if args.json is not None:
        args.json.write_text(json.dumps(rates, indent=2) + "\n")


def _span(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
