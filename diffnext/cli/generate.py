"""``diffnext generate``: pictures or a video of a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these take seconds that --help does not need
    from numpy import ndarray
    from PIL.Image import Image

    from diffnext.pipelines import NOVAPipeline

DESCRIPTION = """\
Draw pictures or a video of a prompt.

  diffnext generate --model assets/nova-tiny "a red star" --guidance-scale 2.5
  diffnext generate --model BAAI/nova-d48w1024-sdxl1024 "a lighthouse on a cliff" --num-images 4
  diffnext generate --model BAAI/nova-d48w1024-osp480 "waves break on a beach" --num-frames 33
  diffnext generate --model BAAI/nova-d48w1024-osp480 "the boat sails away" --image boat.jpg \\
    --num-frames 33 --output boat.mp4

Sample k is drawn with --seed + k, so that each can be drawn again alone. The parameters are written
into each file.
"""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code.
    """
    args = parse_args(argv)
    try:
        for path in generate(args):
            print(path)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="diffnext generate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("--model", required=True, help="release folder, training checkpoint or Hub id")
    add("--negative-prompt", help="what to avoid (nothing)")
    add("--num-images", type=int, default=1, metavar="N", help="samples (1)")
    add("--seed", type=int, default=0, help="of the first sample (0)")
    add("--guidance-scale", type=float, default=5.0, metavar="W", help="weight of the prompt (5)")
    add("--num-inference-steps", type=int, default=64, metavar="N", help="sets a frame (64)")
    add("--num-diffusion-steps", type=int, default=25, metavar="N", help="each (25)")
    add("--num-frames", type=int, default=1, metavar="N", help="of a video; 1 is a picture (1)")
    add("--motion-flow", type=float, default=5.0, metavar="F", help="motion of videos (5)")
    add("--image", type=Path, help="picture that the video begins with")
    add(
        "--output",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one, numbered if there are more samples, or one a sample; .png, .jpg and .webp are "
        "pictures, .mp4 is a video (a new generated.png or generated.mp4)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (the best there is)")
    add(
        "--precision",
        default="auto",
        help="float16, bfloat16 or float32 (float16; on a CPU float32)",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``output`` becomes one path a sample."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("num_images", "num_frames", "num_inference_steps", "num_diffusion_steps"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    suffixes = VIDEOS if args.num_frames > 1 else PICTURES
    for path in args.output or []:
        if path.suffix.lower() not in suffixes:
            what = "video" if args.num_frames > 1 else "picture"
            parser.error(f"--output {path} must be the name of a {what}: use {', '.join(suffixes)}")
    if args.output and len(args.output) not in (1, args.num_images):
        parser.error(f"--output names {len(args.output)} files for {args.num_images} samples")
    args.output = choose_outputs(args.output, args.num_images, suffixes[0])
    return args


def choose_outputs(given: list[Path] | None, count: int, suffix: str) -> list[Path]:
    """The file of each sample.

    Args:
        given: Files of the command line, one or one a sample; None for new ones.
        count: Number of samples.
        suffix: Of new files.
    """
    if given and len(given) == count:
        return given
    if given:
        (path,) = given
        return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]
    paths: list[Path] = []
    number = 0
    while len(paths) < count:
        path = Path(f"generated-{number}{suffix}" if number else f"generated{suffix}")
        if not path.exists():
            paths.append(path)
        number += 1
    return paths


def generate(args: argparse.Namespace) -> list[Path]:
    """Draw what a command line asks for; returns the files that were written."""
    from diffnext.utils import export_to_image, export_to_video
    from diffnext.utils.pictures import load_picture

    image = None if args.image is None else load_picture(args.image)
    clips = draw(load_pipeline(args), image, args)
    for index, (path, clip) in enumerate(zip(args.output, clips, strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        parameters = describe(args, index)
        if args.num_frames > 1:
            export_to_video(clip, path, parameters=parameters)
        else:
            export_to_image(clip[0], path, quality=95, parameters=parameters)
    return args.output


def load_pipeline(args: argparse.Namespace) -> NOVAPipeline:
    """Load the model that a command line names."""
    from diffnext.pipelines import NOVAPipeline
    from diffnext.utils.device_utils import parse_device, parse_precision

    device = parse_device(args.device)
    dtype = parse_precision(args.precision, device)
    pipe = NOVAPipeline.from_pretrained(args.model, dtype=dtype)
    if pipe.transformer.text_embed is None:
        raise ValueError(f"{args.model} draws classes and reads no prompts")
    return pipe.to(device)


def draw(pipe: NOVAPipeline, image: Image | None, args: argparse.Namespace) -> ndarray:
    """Draw all samples, beginning with the image; returns (B, F, H, W, 3) of uint8."""
    import torch

    seeds = range(args.seed, args.seed + args.num_images)
    pixels = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        image=image,
        num_images_per_prompt=args.num_images,
        num_inference_steps=args.num_inference_steps,
        num_diffusion_steps=args.num_diffusion_steps,
        guidance_scale=args.guidance_scale,
        num_frames=args.num_frames if args.num_frames > 1 else None,
        motion_flow=args.motion_flow,
        generator=[torch.Generator(pipe.device).manual_seed(seed) for seed in seeds],
        output_type="np",
        return_dict=False,
    )[0]
    return pixels[:, None] if pixels.ndim == 4 else pixels


def describe(args: argparse.Namespace, index: int) -> dict[str, Any]:
    """What a sample was drawn with."""
    parameters = {
        "model": args.model,
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "image": None if args.image is None else str(args.image),
        "seed": args.seed + index,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "num_diffusion_steps": args.num_diffusion_steps,
        "num_frames": args.num_frames,
        "motion_flow": args.motion_flow if args.num_frames > 1 else None,
    }
    return {name: value for name, value in parameters.items() if value is not None}
