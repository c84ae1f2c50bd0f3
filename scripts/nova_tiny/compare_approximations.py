"""What approximations of sampling gain in time, and what they cost in right pictures.

    python scripts/nova_tiny/compare_approximations.py --model assets/nova-tiny
    python scripts/nova_tiny/compare_approximations.py --model assets/nova-tiny --only guidance steps
    python scripts/nova_tiny/compare_approximations.py --config configs/nova_d48w768_sdxl1024.yaml --size 256

Every approximation is one that the pipeline offers, off by default. All draw the same prompts, turn
by turn; the table has the median time beside that of exact sampling, how far the latents are from exact
ones (root mean square, as a share of that of exact ones), and the score of evaluate_shapes.py with
the same prompts and seeds. With `--config` weights are random, and nothing is scored.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from omegaconf import OmegaConf
from torch import Tensor

from diffnext.cli.parsing import command_parser
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines import NOVAPipeline
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from evaluate_shapes import SPLITS, draw_all, pipeline_drawer, score
from evaluate_shapes import parse_args as parse_scoring_args
from shapes_world.captions import write_prompt
from shapes_world.evaluation import select_descriptions


@dataclass(frozen=True)
class Approximation:
    """A way of sampling faster.

    Attributes:
        name: In the table.
        group: Similar ones, to choose with --only.
        arguments: Of the pipeline's call; they override the usual ones.
        scheduler: Key of ``SCHEDULERS``; the model's own when None.
        dtype: Of the weights.
        quantization: Argument of ``pipe.quantize``, if any.
    """

    name: str
    group: str
    arguments: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    dtype: str = "float32"
    quantization: str | None = None


EXACT = Approximation("exact", "exact")
APPROXIMATIONS = (
    Approximation("guidance_interval=(100, 900)", "guidance", {"guidance_interval": (100, 900)}),
    Approximation("guidance_trunc=300", "guidance", {"guidance_trunc": 300}),
    Approximation("guidance_reuse=2", "reuse", {"guidance_reuse": 2}),
    Approximation("guidance_reuse=4", "reuse", {"guidance_reuse": 4}),
    Approximation("half the sets", "sets", {"set_share": 0.5}),
    Approximation("10 steps, Euler", "steps", {"num_diffusion_steps": 10}),
    Approximation("5 steps, Euler", "steps", {"num_diffusion_steps": 5}),
    Approximation("10 steps, DPM-Solver++ 2M", "steps", {"num_diffusion_steps": 10}, "dpm"),
    Approximation("5 steps, DPM-Solver++ 2M", "steps", {"num_diffusion_steps": 5}, "dpm"),
    Approximation("5 steps, Heun (9 evaluations)", "steps", {"num_diffusion_steps": 5}, "heun"),
    Approximation("bfloat16", "types", dtype="bfloat16"),
    Approximation("int8 weights", "types", quantization="int8"),
    Approximation("int8 weights and activations", "types", quantization="int8_dynamic"),
)
SCHEDULERS: dict[str, Callable[[float], Any]] = {  # by the flow shift of the model's own
    "dpm": lambda shift: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ),
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = [EXACT, *(one for one in APPROXIMATIONS if one.group in args.only)]
    try:
        seconds, latents = draw_in_turns(args, chosen)
        scores = {} if args.config else {one.name: score_one(args, one) for one in chosen}
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(seconds, measure_errors(latents), scores))
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("compare_approximations.py", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a model of shapes: times and scores")
    source.add_argument("--config", type=Path, help="training config: times with random weights")
    groups = list(dict.fromkeys(one.group for one in APPROXIMATIONS))
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, help="(all)")
    parser.add_argument("--size", type=int, help="pixels (those of the config)")
    parser.add_argument("--guidance-scale", type=float, default=2.5, help="(2.5)")
    parser.add_argument("--num-inference-steps", type=int, default=16, help="sets per frame (16)")
    parser.add_argument("--num-diffusion-steps", type=int, default=25, help="steps per set (25)")
    parser.add_argument(
        "--num", type=int, default=48, help="prompts scored per category and split (48)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and pictures (0)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once when timed (1)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(all cores)")
    return parser.parse_args(argv)


@functools.lru_cache
def load_pipeline(
    model: Path | None, config: Path, size: int | None, dtype: str, quantization: str | None
) -> tuple[NOVAPipeline, Any]:
    """A pipeline with these weights, random ones for a config, and the scheduler it came with."""
    if model:
        pipe = NOVAPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    else:
        torch.manual_seed(0)
        transformer = NOVATransformer3DModel(**read_sizes(config, size))
        transformer = transformer.eval().to(getattr(torch, dtype))
        pipe = NOVAPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    if quantization:
        pipe.quantize(quantization)
    return pipe, pipe.scheduler


def read_sizes(config: Path, size: int | None) -> dict[str, Any]:
    """Arguments of the model of a config, for another size in pixels if that is given."""
    loaded = OmegaConf.load(config)
    sizes: Any = OmegaConf.to_container(loaded.pipeline.paths.module_config.transformer)
    if size is None:
        return sizes
    stride = sizes["image_stride"]
    patch = 15 // stride + 1
    side = size // stride // patch
    frames = sizes["video_base_size"][0]
    return {
        **sizes,
        "image_size": [size, size],
        "image_base_size": [side, side],
        "video_base_size": [frames, side // 2, side // 2],
    }


def configure(args: argparse.Namespace, one: Approximation) -> tuple[NOVAPipeline, dict[str, Any]]:
    """The pipeline of an approximation, and the arguments of its call."""
    pipe, first = load_pipeline(args.model, args.config, args.size, one.dtype, one.quantization)
    pipe.scheduler = first
    if one.scheduler:
        pipe.scheduler = SCHEDULERS[one.scheduler](first.config.shift)
    share = one.arguments.get("set_share", 1)
    arguments = {
        "num_inference_steps": round(share * args.num_inference_steps),
        "num_diffusion_steps": args.num_diffusion_steps,
        "guidance_scale": args.guidance_scale,
        **{name: value for name, value in one.arguments.items() if name != "set_share"},
    }
    return pipe, arguments


def draw(args: argparse.Namespace, one: Approximation) -> Tensor:
    """Draw the timed prompts once, without decoding them."""
    pipe, arguments = configure(args, one)
    if args.config:
        arguments |= random_states(pipe, args.batch)
    else:
        wanted = select_descriptions("colors", False, args.batch, args.seed)
        arguments["prompt"] = [write_prompt(description) for description in wanted]
    return pipe(
        generator=torch.Generator().manual_seed(args.seed),
        output_type="latent",
        disable_progress_bar=True,
        return_dict=False,
        **arguments,
    )[0]


def random_states(pipe: NOVAPipeline, count: int) -> dict[str, list[Tensor]]:
    """Random text states, for a pipeline without a text encoder."""
    generator = torch.Generator().manual_seed(1)
    config = pipe.transformer.config
    length = min(30, config["text_token_len"])
    states = torch.randn(count, length, config["text_token_dim"], generator=generator)
    states = states.to(pipe.transformer.dtype)
    return {"prompt_embeds": list(states), "negative_prompt_embeds": [s[:0] for s in states]}


def draw_in_turns(
    args: argparse.Namespace, chosen: Sequence[Approximation]
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of the runs of each, and what it draws; one run before is not measured."""
    seconds: dict[str, list[float]] = {one.name: [] for one in chosen}
    latents = {one.name: draw(args, one) for one in chosen}
    for _ in range(args.runs):
        for one in chosen:
            begin = time.perf_counter()
            draw(args, one)
            seconds[one.name].append(time.perf_counter() - begin)
    return seconds, latents


def measure_errors(latents: dict[str, Tensor]) -> dict[str, float]:
    """How far each is from what exact sampling draws, as a share of its size."""
    exact = latents[EXACT.name].float()
    return {
        name: ((drawn.float() - exact).norm() / exact.norm()).item()
        for name, drawn in latents.items()
    }


def score_one(args: argparse.Namespace, one: Approximation) -> dict[str, float]:
    """Mean share of right pictures over the categories, of each split."""
    pipe, arguments = configure(args, one)
    words = ["--model", args.model, "--num", args.num, "--seed", args.seed]
    scoring = parse_scoring_args([str(word) for word in words])
    drawn = draw_all(scoring, pipeline_drawer(pipe, scoring, **arguments))
    return {split: rows["overall"]["right"] for split, rows in score(drawn).items()}


def format_table(
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    scores: dict[str, dict[str, float]],
) -> str:
    """A Markdown table."""
    splits = list(SPLITS) if scores else []
    header = ["", "s", "times as fast", "latents off by", *(f"{name}: right" for name in splits)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    exact = statistics.median(seconds[EXACT.name])
    for name, values in seconds.items():
        median = statistics.median(values)
        span = f"{median:.3f} ({min(values):.3f}-{max(values):.3f})"
        right = [f"{scores[name][split]:.2f}" for split in splits]
        cells = [name, span, f"{exact / median:.2f}", f"{errors[name]:.2g}", *right]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
