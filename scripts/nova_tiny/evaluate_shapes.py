"""Score a model on the world of coloured shapes: does it draw what prompts ask for?

    diffnext evaluate shapes --model assets/nova-tiny --output scores
    diffnext evaluate shapes --model assets/nova-tiny-video --clips --given-frames 1
    diffnext evaluate shapes --truth
    diffnext evaluate shapes --vae assets/nova-tiny/vae

Prompts are drawn at random in the categories of GenEval (arXiv:2310.11513), separately for
combinations in the training data and for those held out. A picture is right if a detector finds
exactly the shapes, colours, number and relation of the prompt; a clip is right if its first frame
is, 90 % of its frames show the shapes of the prompt (identity), and the first shape moves as asked.
Agreement is the share of such frames over all clips. With `--given-frames` models continue rendered
clips, and every colour is named. `--truth` scores rendered pictures instead, and `--vae`
reconstructions. Intervals hold the true share with 95 % confidence. With the category attribution,
models of pictures also get their binding share (see shapes_world/binding.py). The folder gets
scores.json, scores.md and sheet.png, where a cross marks wrong pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from diffnext.cli.parsing import command_parser
from diffnext.data.caching.contact_sheet import arrange, decode_frames, draw_cell
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.loading import load_autoencoder
from diffnext.pipelines import NOVAPipeline
from diffnext.utils.folders import public_name
from make_shapes_dataset import encode
from shapes_world.binding import measure_binding
from shapes_world.captions import write_prompt
from shapes_world.evaluation import Verdict, judge, select_descriptions
from shapes_world.rendering import render_clip, render_scene
from shapes_world import scenes

SPLITS = {"seen": False, "held out": True}
SHEET_COLUMNS = 12


@dataclass(frozen=True)
class Drawing:
    """What a prompt became.

    Attributes:
        category: Of the prompt.
        split: "seen" or "held out".
        description: What was asked for.
        frames: (F, S, S, 3) of uint8.
        verdict: Of the detector.
    """

    category: str
    split: str
    description: scenes.Description
    frames: ndarray
    verdict: Verdict


Draw = Callable[[Sequence[scenes.Description], int], Iterable[ndarray]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        if args.truth:
            evaluate_truth(args)
        elif args.vae:
            evaluate_vae(args)
        else:
            evaluate_model(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("diffnext evaluate shapes", __doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="pipeline folder or checkpoint to score")
    what.add_argument("--truth", action="store_true", help="score rendered pictures")
    what.add_argument("--vae", type=Path, help="score reconstructions of this autoencoder")
    add("--output", type=Path, help="folder for scores and sheet (none)")
    add("--num", type=int, default=48, help="prompts per category and split (48)")
    add("--seed", type=int, default=0, help="of prompts and pictures (0)")
    add("--categories", nargs="+", choices=scenes.CATEGORIES, help="some only (all)")
    add("--clips", action="store_true", help="score clips, not pictures")
    add("--num-frames", type=int, default=17, help="frames of clips (17)")
    add("--given-frames", type=int, default=0, help="clips begin with these: 1 is a picture (0)")
    add("--guidance-scale", type=float, default=2.5, help="(2.5)")
    add("--num-inference-steps", type=int, default=16, help="sets per frame (16)")
    add("--num-diffusion-steps", type=int, default=25, help="steps per set (25)")
    add("--batch-size", type=int, default=24, help="prompts at once (24)")
    add("--device", default="cpu", help="cpu, cuda (cpu)")
    args = parser.parse_args(argv)
    known = scenes.CLIP_CATEGORIES if args.clips else scenes.CATEGORIES
    args.categories = args.categories or list(known)
    if not set(args.categories) <= set(known):
        parser.error(f"the categories of --clips are {', '.join(known)}")
    if not 0 <= args.given_frames < args.num_frames or (args.given_frames and not args.clips):
        parser.error("--given-frames needs --clips, and must be below --num-frames")
    return args


# --- drawings -----------------------------------------------------------------------------


def evaluate_model(args: argparse.Namespace) -> None:
    """Score a model; print and write the result."""
    begin = time.monotonic()
    pipe = load_pipeline(args)
    drawings = draw_all(args, pipeline_drawer(pipe, args))
    settings = {
        "model": public_name(str(args.model)),
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "num_diffusion_steps": args.num_diffusion_steps,
        **({"given_frames": args.given_frames} if args.clips else {}),
        "seed": args.seed,
        "seconds": round(time.monotonic() - begin, 1),
    }
    if "attribution" in args.categories and not args.clips:
        settings["binding"] = measure_binding(pipe, args.seed)
    report(args, drawings, settings)


def evaluate_truth(args: argparse.Namespace) -> None:
    """Score rendered pictures, all of which are right."""
    drawings = draw_all(args, lambda descriptions, seed: render(args, descriptions, seed))
    report(args, drawings, {"model": "rendered", "seed": args.seed})


def evaluate_vae(args: argparse.Namespace) -> None:
    """Score reconstructions, and measure them in dB."""
    vae = load_autoencoder(args.vae, device=args.device)
    if isinstance(vae, AutoencoderKLOpenSora) != args.clips:
        kind = type(vae).__name__
        raise ValueError(f"--vae {args.vae} is an {kind}: use --clips only for clips")
    errors = []

    def reconstruct(descriptions: Sequence[scenes.Description], seed: int) -> Iterable[ndarray]:
        for frames in render(args, descriptions, seed):
            rebuilt = decode_frames(vae, encode(vae, frames[None])[0])
            errors.append(np.square(rebuilt.astype(np.float64) - frames).mean())
            yield rebuilt

    drawings = draw_all(args, reconstruct)
    psnr = round(float(np.mean(10 * np.log10(255**2 / np.array(errors)))), 2)
    report(args, drawings, {"vae": str(args.vae), "psnr": psnr, "seed": args.seed})


def draw_all(args: argparse.Namespace, draw: Draw) -> list[Drawing]:
    """Draw and judge every prompt of every category, seen and held out."""
    wanted = [
        (category, split, description)
        for category in args.categories
        for split, held_out in SPLITS.items()
        for description in select_descriptions(
            category, held_out, args.num, args.seed, is_clip=args.clips
        )
    ]
    if args.given_frames:
        rng = np.random.default_rng(args.seed)
        wanted = [(*names, scenes.name_colors(rng, description)) for *names, description in wanted]
    drawings = []
    for start in tqdm(range(0, len(wanted), args.batch_size), unit="batch", leave=False):
        batch = wanted[start : start + args.batch_size]
        pictures = draw([description for *_, description in batch], args.seed + start)
        for (category, split, description), frames in zip(batch, pictures, strict=True):
            verdict = judge(description, frames)
            drawings.append(Drawing(category, split, description, frames, verdict))
    return drawings


def render(
    args: argparse.Namespace, descriptions: Sequence[scenes.Description], seed: int
) -> Iterable[ndarray]:
    """Render what prompts ask for, (F, S, S, 3) of uint8 each."""
    for index, description in enumerate(descriptions):
        rng = np.random.default_rng([seed, index])
        if args.clips:
            clip = scenes.draw_clip(rng, description, strength=1)  # the motion that pipelines ask for
            yield render_clip(clip, args.num_frames)
        else:
            yield render_scene(scenes.draw_scene(rng, description))[None]


def load_pipeline(args: argparse.Namespace) -> NOVAPipeline:
    """Load the model in float32."""
    return NOVAPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)


def pipeline_drawer(pipe: NOVAPipeline, args: argparse.Namespace, **options: Any) -> Draw:
    """Draw prompts with a model; every prompt has its own seed.

    Args:
        pipe: The model.
        args: Settings of this script.
        **options: Arguments of the pipeline, which override those of ``args``.
    """

    def draw(descriptions: Sequence[scenes.Description], seed: int) -> Iterable[ndarray]:
        seeds = range(seed, seed + len(descriptions))
        arguments = {
            "num_inference_steps": args.num_inference_steps,
            "num_diffusion_steps": args.num_diffusion_steps,
            "guidance_scale": args.guidance_scale,
            "generator": [torch.Generator(args.device).manual_seed(one) for one in seeds],
            "output_type": "np",
            "disable_progress_bar": True,
            "vae_batch_size": len(descriptions),
            **({"num_frames": args.num_frames} if args.clips else {}),
            **given_frames(args, descriptions, seed),
        }
        prompts = [write_prompt(description) for description in descriptions]
        output: Any = pipe(prompts, **{**arguments, **options})
        return output.frames if args.clips else output.images[:, None]

    return draw


def given_frames(
    args: argparse.Namespace, descriptions: Sequence[scenes.Description], seed: int
) -> dict[str, ndarray]:
    """Argument of the pipeline with the rendered frames that clips begin with."""
    if not args.given_frames:
        return {}
    clips = np.stack([clip[: args.given_frames] for clip in render(args, descriptions, seed)])
    return {"image": clips[:, 0]} if args.given_frames == 1 else {"video": clips}


# --- scores -------------------------------------------------------------------------------------


def score(drawings: Sequence[Drawing]) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of right pictures by split and category; "overall" is the mean over categories."""
    scores: dict[str, dict[str, dict[str, float]]] = {split: {} for split in SPLITS}
    for split, rows in scores.items():
        for category in dict.fromkeys(drawing.category for drawing in drawings):
            verdicts = [
                drawing.verdict
                for drawing in drawings
                if drawing.category == category and drawing.split == split
            ]
            if verdicts:
                rows[category] = share(verdicts)
        if rows:
            rows["overall"] = average(list(rows.values()))
    return scores


def share(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of the verdicts that are positive, with its interval, and in each respect."""
    right = sum(verdict.is_right for verdict in verdicts)
    low, high = wilson_interval(right, len(verdicts))
    shares = {"right": right / len(verdicts), "low": low, "high": high}
    for name in ("content", "agreement", "identity", "motion"):
        values = [getattr(verdict, name) for verdict in verdicts]
        if values[0] is not None and verdicts[0].motion is not None:
            shares[name] = float(np.mean(values))
    return shares | {"prompts": len(verdicts)}


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over categories, with the interval for independent shares."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    reach = math.hypot(*(row["high"] - row["low"] for row in rows)) / 2 / len(rows)
    return means | {"low": max(means["right"] - reach, 0.0), "high": min(means["right"] + reach, 1)}


def wilson_interval(right: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """Where a share lies with 95 % confidence (Wilson, 1927)."""
    share, spread = right / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def report(args: argparse.Namespace, drawings: Sequence[Drawing], settings: dict[str, Any]) -> None:
    """Print the table; write it, the numbers and the sheet if there is an output folder."""
    scores = score(drawings)
    table = format_scores(scores)
    print(json.dumps(settings))
    print(table)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "scores": scores}, indent=2)
        (args.output / "scores.json").write_text(content + "\n")
        (args.output / "scores.md").write_text(table + "\n")
        make_sheet(drawings).save(args.output / "sheet.png")


def format_scores(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table of scores."""
    hidden = ("prompts", "low", "high")  # the interval is shown with the share
    columns = [name for name in next(iter(scores["seen"].values())) if name not in hidden]
    header = ["category", *(f"{split}: {name}" for split in SPLITS for name in columns)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for category in scores["seen"]:
        cells = [
            format_cell(scores[split].get(category), name) for split in SPLITS for name in columns
        ]
        lines.append(f"| {' | '.join([category, *cells])} |")
    return "\n".join(lines)


def format_cell(row: dict[str, float] | None, name: str) -> str:
    """A share; the share of right pictures has its interval."""
    if row is None:
        return "-"
    interval = f" ({row['low']:.2f} to {row['high']:.2f})" if name == "right" else ""
    return f"{row[name]:.2f}{interval}"


def make_sheet(drawings: Sequence[Drawing]) -> Image.Image:
    """A row of pictures of each category and split; captions of wrong ones begin with a cross."""
    groups: dict[tuple[str, str], list[Image.Image]] = {}
    for drawing in drawings:
        cells = groups.setdefault((drawing.category, drawing.split), [])
        mark = "" if drawing.verdict.is_right else "x "
        cells.append(draw_cell(drawing.frames, mark + write_prompt(drawing.description)))
    shown = [cell for cells in groups.values() for cell in cells[:SHEET_COLUMNS]]
    return arrange(shown, SHEET_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
