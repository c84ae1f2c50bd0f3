"""Render captioned pictures or clips of coloured shapes, as records of latents or as files.

    python scripts/nova_tiny/make_shapes_dataset.py --output DIR --vae VAE --num 50000
    python scripts/nova_tiny/make_shapes_dataset.py --output DIR --vae VIDEO_VAE --num 20000 --clips
    python scripts/nova_tiny/make_shapes_dataset.py --output DIR --vae VAE --num 20000 --clips
    python scripts/nova_tiny/make_shapes_dataset.py --output DIR --files --num 20

Example i of a seed is the same in every dataset of that seed: a longer dataset begins with the
shorter one. Records are as in TRAINING.md: the moments of the autoencoder's posterior, a long and a
short caption and, for clips, the strength of the motion as a flow of 5 or 10. An image autoencoder
encodes every fourth frame of clips, which is much faster; a video autoencoder that was fitted with
`align_with` this one has the same latents. `--files` writes PNGs (for clips, GIFs) and
captions.jsonl instead. No example shows a combination that
shapes_world/scenes.py holds out. The output folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from numpy import ndarray
from tqdm import tqdm

from diffnext.cli.parsing import command_parser
from diffnext.data.records import RecordWriter
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.loading import load_autoencoder
from shapes_world.captions import write_caption, write_prompt
from shapes_world.rendering import draw_example
from shapes_world.scenes import CATEGORIES, CLIP_CATEGORIES, MIXED_SHAPES, SHAPES

FEATURES = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
FRAMES_PER_SECOND = 8  # of GIFs
FRAMES_PER_LATENT = 4  # of clips, after the first


@dataclass(frozen=True)
class Example:
    """A picture or a clip with its captions.

    Attributes:
        caption: In varied wording.
        text: In the plain wording of prompts.
        frames: (F, S, S, 3) of uint8; one for a picture.
        flow: Motion strength, usually 5; 0 for a picture.
    """

    caption: str
    text: str
    frames: ndarray
    flow: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    if args.output.exists():
        print(f"error: --output {args.output} exists: name a new folder", file=sys.stderr)
        return 1
    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if args.files:
            write_files(args, partial)
        else:
            write_records(args, partial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    partial.rename(args.output)
    print(f"Wrote {args.num} {'clips' if args.clips else 'pictures'} to {args.output}")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("make_shapes_dataset.py", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; must be new")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--vae", type=Path, help="folder of the autoencoder: write records")
    target.add_argument("--files", action="store_true", help="write pictures or GIFs")
    add("--num", type=int, default=10000, help="examples (10000)")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--size", type=int, default=64, help="side in pixels (64)")
    add("--clips", action="store_true", help="render clips")
    add("--num-frames", type=int, default=17, help="frames of a clip (17)")
    add(
        "--categories",
        nargs="+",
        choices=CATEGORIES,
        help="kinds of pictures, drawn evenly; naming one twice doubles it (all)",
    )
    add("--more-shapes", action="store_true", help="half of the shapes are others than those of evaluations")
    add("--batch-size", type=int, default=16, help="pictures encoded at once (16)")
    add("--device", default="cpu", help="where to encode: cpu, cuda (cpu)")
    add("--bf16", action="store_true", help="encode in bfloat16: errors below the posterior's noise")
    args = parser.parse_args(argv)
    if args.num < 1 or args.size < 16:
        parser.error("--num must be at least 1, --size at least 16")
    if args.vae and args.num_frames % FRAMES_PER_LATENT != 1:
        parser.error(f"--num-frames must be {FRAMES_PER_LATENT} m + 1, got {args.num_frames}")
    known = CLIP_CATEGORIES if args.clips else CATEGORIES
    args.categories = args.categories or list(known)
    if not set(args.categories) <= set(known):
        parser.error(f"the categories of --clips are {', '.join(known)}")
    return args


def make_example(args: argparse.Namespace, index: int) -> Example:
    """Render one example."""
    rng = np.random.default_rng([args.seed, index])
    num_frames = args.num_frames if args.clips else None
    known = MIXED_SHAPES if args.more_shapes else SHAPES
    description, frames, flow = draw_example(rng, args.categories, args.size, num_frames, known)
    return Example(write_caption(rng, description), write_prompt(description), frames, flow)


def write_records(args: argparse.Namespace, folder: Path) -> None:
    """Encode the examples and write them as records.

    Raises:
        ValueError: If the autoencoder is not for this.
    """
    vae = load_autoencoder(args.vae, device=args.device)
    if isinstance(vae, AutoencoderKLOpenSora) and not args.clips:
        raise ValueError(f"--vae {args.vae} is for clips: add --clips")
    if is_framewise := args.clips and isinstance(vae, AutoencoderKL):
        args.num_frames = (args.num_frames - 1) // FRAMES_PER_LATENT + 1
    features = {**FEATURES, "flow": "float64"} if args.clips else FEATURES
    with RecordWriter(folder, features) as writer:
        for examples in batches(args):
            frames = np.stack([example.frames for example in examples])
            with torch.autocast(vae.device.type, torch.bfloat16, enabled=args.bf16):
                moments = (encode_framewise if is_framewise else encode)(vae, frames)
            for example, values in zip(examples, moments, strict=True):
                record: dict[str, Any] = {"caption": example.caption, "text": example.text}
                record |= {"moments": values.tobytes(), "shape": list(values.shape)}
                if args.clips:
                    record["flow"] = example.flow
                writer.write(record)


def write_files(args: argparse.Namespace, folder: Path) -> None:
    """Write the examples as pictures or GIFs beside their captions."""
    with (folder / "captions.jsonl").open("w") as captions:
        examples = (example for batch in batches(args) for example in batch)
        for index, example in enumerate(examples):
            name = f"{index:06d}.{'gif' if args.clips else 'png'}"
            if args.clips:
                duration = 1000 // FRAMES_PER_SECOND
                imageio.imwrite(folder / name, example.frames, duration=duration, loop=0)
            else:
                imageio.imwrite(folder / name, example.frames[0])
            line = {"file": name, "caption": example.caption, "text": example.text}
            captions.write(json.dumps(line) + "\n")


def batches(args: argparse.Namespace) -> Iterator[list[Example]]:
    """All examples in order, with a progress bar."""
    size = max(1, args.batch_size // (args.num_frames if args.clips else 1))
    with tqdm(total=args.num, unit="clip" if args.clips else "picture") as bar:
        for start in range(0, args.num, size):
            stop = min(start + size, args.num)
            yield [make_example(args, index) for index in range(start, stop)]
            bar.update(stop - start)


@torch.no_grad()
def encode(vae: AutoencoderKL | AutoencoderKLOpenSora, frames: ndarray) -> ndarray:
    """The posterior's moments of pictures or clips.

    Args:
        vae: The autoencoder.
        frames: (B, F, S, S, 3) of uint8; one frame of pictures.

    Returns:
        (B, 2C, h, w), or (B, 2C, T, h, w) of clips, of float16.
    """
    pixels = torch.from_numpy(frames).to(vae.device).float().sub(127.5).div(127.5)
    pixels = pixels.permute(0, 4, 1, 2, 3)
    if isinstance(vae, AutoencoderKL):
        pixels = pixels.squeeze(2)
    return vae.encode(pixels).latent_dist.parameters.half().cpu().numpy()


@torch.no_grad()
def encode_framewise(vae: AutoencoderKL, frames: ndarray) -> ndarray:
    """Scaled moments of frames, as an aligned video autoencoder has them for every fourth frame.

    Args:
        vae: An image autoencoder.
        frames: (B, T, S, S, 3) of uint8.

    Returns:
        (B, 2C, T, h, w) of float16; their scaling factor is 1.
    """
    moments = torch.from_numpy(encode(vae, frames.reshape(-1, 1, *frames.shape[2:]))).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance + 2 * math.log(vae.config["scaling_factor"])
    scaled = torch.cat([vae.scale_(mean), log_variance], dim=1)
    return scaled.unflatten(0, frames.shape[:2]).transpose(1, 2).half().contiguous().numpy()


if __name__ == "__main__":
    sys.exit(main())
