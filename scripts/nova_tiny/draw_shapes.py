"""Draw with the pretrained tiny models: four prompts and a clip, in seconds on a CPU.

    python scripts/nova_tiny/draw_shapes.py --output drawn
    python scripts/nova_tiny/draw_shapes.py "a pink cross" "two cyan stars" --seed 1
    python scripts/nova_tiny/draw_shapes.py "a ring" --clip "a star turning"

The folder gets shapes.png, one picture a prompt, and of a clip clip.gif and its strip of frames
clip.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as imageio
import torch
from PIL import Image, ImageDraw

from diffnext.pipelines import NOVAPipeline

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PROMPTS = ("a red star", "a ring", "a blue cross", "two green squares")
CLIP_PROMPT = "a blue circle moving right"
GUIDANCE_SCALE = 2.5  # scripts/nova_tiny/evaluate_shapes.py --sweep: the best for this model
NUM_FRAMES = 17
SHOWN_FRAMES = range(0, NUM_FRAMES, 4)
FRAME_DURATION = 125  # milliseconds
ZOOM = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        draw_pictures(args)
        if args.clip:
            draw_clip(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", help="(four of our own)")
    parser.add_argument("--clip", help="prompt of a clip (one of our own; none beside prompts)")
    parser.add_argument("--model", type=Path, default=ASSETS / "nova-tiny", help="of pictures")
    parser.add_argument(
        "--clip-model", type=Path, default=ASSETS / "nova-tiny-video", help="of clips"
    )
    parser.add_argument("--output", type=Path, default=Path("drawn"), help="folder (drawn)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (0)")
    args = parser.parse_args(argv)
    if not args.prompts:
        args.prompts = list(PROMPTS)
        args.clip = args.clip or CLIP_PROMPT
    return args


def draw_pictures(args: argparse.Namespace) -> None:
    """Draw the prompts side by side."""
    pipe = NOVAPipeline.from_pretrained(args.model)
    begin = time.monotonic()
    seeds = range(args.seed, args.seed + len(args.prompts))
    pictures = pipe(
        args.prompts,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "shapes.png"
    make_sheet(pictures, args.prompts).save(path)
    print(f"Wrote {path}: {len(pictures)} prompts, {time.monotonic() - begin:.1f} s")


def draw_clip(args: argparse.Namespace) -> None:
    """Draw the clip."""
    pipe = NOVAPipeline.from_pretrained(args.clip_model)
    begin = time.monotonic()
    frames = pipe(
        args.clip,
        num_frames=NUM_FRAMES,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    path = args.output / "clip.gif"
    imageio.imwrite(path, frames, duration=FRAME_DURATION, loop=0)
    shown = [Image.fromarray(frames[index]) for index in SHOWN_FRAMES]
    make_sheet(shown, [args.clip, *[""] * (len(shown) - 1)]).save(args.output / "clip.png")
    print(f"Wrote {path}: {len(frames)} frames, {time.monotonic() - begin:.1f} s")


def make_sheet(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """The pictures side by side, enlarged, each above its prompt."""
    side = ZOOM * pictures[0].width
    sheet = Image.new("RGB", (len(pictures) * (side + 8) + 8, side + 32), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left = 8 + column * (side + 8)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, 8))
        pen.text((left, side + 12), prompt[: side // 6], fill="black")
    return sheet


if __name__ == "__main__":
    sys.exit(main())
