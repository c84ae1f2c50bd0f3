"""``diffnext generate``: pictures or videos from prompts."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffnext.cli.parsing import MODEL_HELP, add_device_options, command_parser, run
from diffnext.utils.folders import public_name
from diffnext.utils.messages import did_you_mean

if TYPE_CHECKING:  # these take seconds that --help does not need
    from numpy import ndarray
    from PIL.Image import Image

    from diffnext.pipelines import NOVAPipeline

DESCRIPTION = """\
Generate pictures or videos from prompts.

  diffnext generate "a red star" --model assets/nova-tiny
  diffnext generate "a red star" "two green squares" --model assets/nova-tiny --output shapes.png
  diffnext generate --prompts prompts.txt --model assets/nova-tiny --output drawn/shape.png
  diffnext generate --model BAAI/nova-d48w1024-sdxl1024 "a lighthouse on a cliff" --num-images 4
  diffnext generate --model BAAI/nova-d48w1024-osp480 "waves break on a beach" --num-frames 33
  diffnext generate --model BAAI/nova-d48w1024-osp480 "the boat sails away" --image boat.jpg \\
    --num-frames 33 --output boat.mp4
  diffnext generate --model runs/first "a boat"   # the newest checkpoint of a training run

Defaults come from the model's card. Sample k, counted over all prompts, has the seed --seed + k,
so you can generate each of them again. The parameters are written into each file.
"""
MAX_SEED = 2**62  # sums with the number of a sample fit into 64 bits
MAX_GUIDANCE = 100  # as of model cards
STEPS = ("num_inference_steps", "num_diffusion_steps")
COUNTS = ("num_images", "num_frames", "max_context_frames", *STEPS)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".webm", ".gif")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default the process's.

    Returns:
        The exit code.
    """
    args = parse_args(argv)
    return run(lambda: generate(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext generate", DESCRIPTION)
    add = parser.add_argument
    add("prompt", nargs="*", help="what to show")
    add("--prompts", type=Path, metavar="FILE", help="more prompts, one per line")
    add("--model", required=True, help=MODEL_HELP)
    add("--negative-prompt", help="what to avoid (the card's, or nothing)")
    add("--num-images", type=int, default=1, metavar="N", help="samples per prompt (1)")
    add("--seed", type=int, default=0, help="of the first sample (0)")
    add("--guidance-scale", type=float, metavar="W", help="weight of the prompt (the card's, or 5)")
    add("--num-inference-steps", type=int, metavar="N", help="sets per frame (the card's, or 64)")
    add("--num-diffusion-steps", type=int, metavar="N", help="steps per set (the card's, or 25)")
    add(
        "--num-frames", type=int, default=1, metavar="N", help="frames of a video; 1: a picture (1)"
    )
    add(
        "--max-context-frames",
        type=int,
        metavar="N",
        help="latent frames of a video that the next one is generated from, to bound memory (all)",
    )
    add("--motion-flow", type=float, default=5.0, metavar="F", help="motion strength of videos (5)")
    add("--image", type=Path, help="picture that the video begins with")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="numbered if there are several samples; .png, .jpg and .webp are pictures; .mp4, "
        ".webm and .gif are videos (a new generated.png or generated.mp4)",
    )
    add_device_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``output`` becomes a path for each sample."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    args.prompt += read_prompts(parser, args.prompts)
    if not args.prompt:
        parser.error("a prompt is needed: say what to show")
    for name in COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.seed <= MAX_SEED:
        parser.error(f"--seed must be 0 to {MAX_SEED}, got {args.seed}")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale <= MAX_GUIDANCE:
        parser.error(f"--guidance-scale must be 0 to {MAX_GUIDANCE}, got {args.guidance_scale}")
    if args.image is not None and not args.image.is_file():
        parser.error(f"--image {args.image}: there is no such file{did_you_mean(args.image)}")
    suffixes = VIDEOS if args.num_frames > 1 else PICTURES
    if args.output is not None and args.output.suffix.lower() not in suffixes:
        what = "video" if args.num_frames > 1 else "picture"
        parser.error(
            f"--output {args.output} must be the name of a {what}: use {', '.join(suffixes)}"
        )
    args.output = choose_outputs(args.output, len(args.prompt) * args.num_images, suffixes[0])
    return args


def read_prompts(parser: argparse.ArgumentParser, file: Path | None) -> list[str]:
    """The lines of a file of prompts that hold any text."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        parser.error(f"--prompts {file} cannot be read: {error.strerror}{did_you_mean(file)}")
    except UnicodeDecodeError as error:
        parser.error(f"--prompts {file} is not text in UTF-8: {error}")
    prompts = [line.strip() for line in lines if line.strip()]
    return prompts or parser.error(f"--prompts {file} is empty")


def choose_outputs(given: Path | None, count: int, suffix: str) -> list[Path]:
    """The file of each sample.

    Args:
        given: From the command line; None for new files.
        count: Number of samples.
        suffix: Ending of new files.
    """
    if given is not None and count == 1:
        return [given]
    if given is not None:
        return [given.with_stem(f"{given.stem}-{index}") for index in range(count)]
    names = (f"generated-{number}" if number else "generated" for number in itertools.count())
    paths = (Path(f"{name}{suffix}") for name in names)
    return list(itertools.islice((path for path in paths if not path.exists()), count))


def generate(args: argparse.Namespace) -> None:
    """Do what a command line asks for, prompt by prompt; print each file once it is written."""
    from diffnext.utils.folders import find_folder, newest_checkpoint
    from diffnext.utils.pictures import load_picture

    folder = newest_checkpoint(find_folder(args.model))
    settings = read_settings(args, folder)
    image = None if args.image is None else load_picture(args.image)
    if image is not None and args.num_frames == 1:
        raise ValueError(f"{args.image} is the beginning of a video: give --num-frames, 5 or more")
    pipe = load_pipeline(folder, args)
    for index, prompt in enumerate(args.prompt):
        first = index * args.num_images
        clips = draw(pipe, prompt, args.seed + first, image, settings, args)
        for number, clip in enumerate(clips, start=first):
            parameters = describe(prompt, args.seed + number, settings, args)
            write(clip, args.output[number], parameters)
            print(args.output[number], flush=True)


def read_settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Values of the command line or, where it has none, of the model's card."""
    from diffnext.pipelines.model_card import Defaults, Ranges, read_defaults

    ranges = Ranges((0, MAX_GUIDANCE), (1, 4096), (1, 4096))
    settings = vars(read_defaults(folder, Defaults(), ranges))
    names = ("guidance_scale", *STEPS, "negative_prompt")
    given = {name: getattr(args, name) for name in names}
    return {name: settings[name] if value is None else value for name, value in given.items()}


def write(clip: ndarray, path: Path, parameters: dict[str, Any]) -> None:
    """Write a picture, or a video if there are several frames, (F, H, W, 3) of uint8."""
    from diffnext.utils import export_to_image, export_to_video

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in VIDEOS:
        export_to_video(clip, path, parameters=parameters)
    else:
        export_to_image(clip[0], path, quality=95, parameters=parameters)


def load_pipeline(folder: Path, args: argparse.Namespace) -> NOVAPipeline:
    """Load the model of a folder."""
    from diffnext.pipelines import NOVAPipeline
    from diffnext.utils.device_utils import parse_device, parse_precision

    device = parse_device(args.device)
    dtype = parse_precision(args.precision, device)
    pipe = NOVAPipeline.from_pretrained(folder, dtype=dtype)
    if pipe.transformer is not None and pipe.transformer.text_embed is None:
        raise ValueError(f"{args.model} is class-conditional and takes no prompts")
    return pipe.to(device)


def draw(
    pipe: NOVAPipeline,
    prompt: str,
    seed: int,
    image: Image | None,
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> ndarray:
    """Draw the samples of a prompt, beginning with the image; returns (B, F, H, W, 3) of uint8."""
    import torch

    seeds = range(seed, seed + args.num_images)
    pixels = pipe(
        prompt,
        image=image,
        num_images_per_prompt=args.num_images,
        num_frames=args.num_frames if args.num_frames > 1 else None,
        max_context_frames=args.max_context_frames,
        motion_flow=args.motion_flow,
        generator=[torch.Generator(pipe.device).manual_seed(one) for one in seeds],
        output_type="np",
        return_dict=False,
        **settings,
    )[0]
    return pixels[:, None] if pixels.ndim == 4 else pixels


def describe(
    prompt: str, seed: int, settings: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The parameters of a sample, as its file holds them."""
    parameters = {
        "model": public_name(args.model),
        "prompt": prompt,
        "negative_prompt": settings["negative_prompt"] or None,
        "image": None if args.image is None else args.image.name,
        "seed": seed,
        **{name: settings[name] for name in ("guidance_scale", *STEPS)},
        "num_frames": args.num_frames,
        "max_context_frames": args.max_context_frames,
        "motion_flow": args.motion_flow if args.num_frames > 1 else None,
    }
    return {name: value for name, value in parameters.items() if value is not None}
