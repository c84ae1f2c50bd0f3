"""``diffnext evaluate``: the samples of a benchmark, in the layout that its scorer reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffnext.cli.parsing import command_parser
from diffnext.evaluation import SEED

if TYPE_CHECKING:  # takes seconds that --help does not need
    from diffnext.evaluation.sampling import SamplingOptions

DESCRIPTION = """\
Draw the samples of a benchmark, in the layout that its scorer reads.

  diffnext evaluate geneval --metadata evaluation_metadata.jsonl \\
    --ckpt BAAI/nova-d48w1024-sdxl1024 --outdir geneval/nova
  diffnext evaluate vbench --prompt prompts.json --prompt_key dense_prompt \\
    --ckpt BAAI/nova-d48w1024-osp480 --outdir vbench/nova
  torchrun --nproc_per_node 8 -m diffnext evaluate geneval ...

What is there already is not drawn again, so that the same command goes on after a stop. Prompts
come from the benchmarks' own repositories; docs/evaluation.md says how.
"""
GENEVAL = """\
Draw the pictures of GenEval (arXiv:2310.11513): OUTDIR/<prompt, 5 digits>/metadata.jsonl and
OUTDIR/<prompt>/samples/<sample, 5 digits>.png.
"""
VBENCH = """\
Draw the videos of VBench's standard suite (arXiv:2311.17982): OUTDIR/<tag>/<prompt>-<sample>.mp4,
12 frames per second.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        done = args.draw(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {done} to {args.outdir}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext evaluate", DESCRIPTION)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    geneval = benchmarks.add_parser("geneval", help="pictures", description=GENEVAL)
    geneval.add_argument("--metadata", required=True, help="the benchmark's metadata (.jsonl)")
    states = "prompts.json, or text states of `diffnext encode` (.pth)"
    geneval.add_argument("--prompt", default="", help=f"{states}; (those of --metadata)")
    add_sampling_arguments(geneval, prompt_size=16, sample_size=4, vae_batch_size=16)
    geneval.set_defaults(draw=draw_geneval)
    vbench = benchmarks.add_parser("vbench", help="videos", description=VBENCH)
    vbench.add_argument("--prompt", required=True, help=states)
    vbench.add_argument("--max_latent_length", type=int, default=9, help="latent frames (9)")
    vbench.add_argument("--flow", type=float, default=5.0, help="motion strength (5)")
    add_sampling_arguments(vbench, prompt_size=8, sample_size=5, vae_batch_size=1)
    vbench.set_defaults(draw=draw_vbench)
    return parser


def add_sampling_arguments(
    parser: argparse.ArgumentParser, prompt_size: int, sample_size: int, vae_batch_size: int
) -> None:
    """Add the options that every benchmark has, to the parser; numbers are defaults."""
    add = parser.add_argument
    add(
        "--ckpt", type=nonempty, required=True, help="release folder, training checkpoint or Hub id"
    )
    add("--outdir", type=nonempty, required=True, help="folder; what is there is not drawn again")
    add("--prompt_key", default="prompt", help="text to draw: prompt or dense_prompt (prompt)")
    add("--num_pred_steps", type=int, default=128, help="sets of tokens per frame (128)")
    add("--num_diff_steps", type=int, default=25, help="denoising steps of each (25)")
    add("--guidance_scale", type=float, default=7.0, help="weight of the prompt (7)")
    add("--prompt_size", type=int, default=prompt_size, help=f"prompts at once ({prompt_size})")
    add("--sample_size", type=int, default=sample_size, help=f"samples each ({sample_size})")
    add("--vae_batch_size", type=int, default=vae_batch_size, help=f"at once ({vae_batch_size})")
    add("--seed", type=int, default=SEED, help=f"of all samples ({SEED})")
    add("--compat", action="store_true", help="one generator for the whole run, as NOVA's first")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (the best there is)")
    add("--precision", default="auto", help="(float16; on a CPU float32)")


def nonempty(text: str) -> str:
    """A value that says something: an empty path would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def draw_geneval(args: argparse.Namespace) -> str:
    """Draw pictures; says how many were written."""
    from diffnext.evaluation.layouts import GenEvalLayout
    from diffnext.evaluation.prompts import read_geneval
    from diffnext.evaluation.sampling import Shard, draw_benchmark

    prompts, records = read_geneval(args.metadata, args.prompt, args.prompt_key)
    layout = GenEvalLayout(args.outdir, records)
    count = draw_benchmark(prompts, layout, options_from(args), Shard.from_environment())
    return f"{count} pictures"


def draw_vbench(args: argparse.Namespace) -> str:
    """Draw videos; says how many were written."""
    from diffnext.evaluation.layouts import VBenchLayout
    from diffnext.evaluation.prompts import read_vbench
    from diffnext.evaluation.sampling import Shard, draw_benchmark

    prompts = read_vbench(args.prompt, args.prompt_key)
    layout = VBenchLayout(args.outdir, prompts.texts or (), prompts.tags or ())
    options = options_from(args, max_latent_length=args.max_latent_length, flow=args.flow)
    count = draw_benchmark(prompts, layout, options, Shard.from_environment())
    return f"{count} videos"


def options_from(args: argparse.Namespace, **others: Any) -> SamplingOptions:
    """Options of a command line.

    Args:
        args: Parsed with :func:`add_sampling_arguments`.
        **others: Options that only this benchmark has.

    Raises:
        ValueError: If a value cannot be.
    """
    from diffnext.evaluation.sampling import SamplingOptions

    ckpt = Path(args.ckpt).expanduser()
    return SamplingOptions(
        ckpt=str(ckpt.absolute()) if ckpt.exists() else args.ckpt,
        num_pred_steps=args.num_pred_steps,
        num_diff_steps=args.num_diff_steps,
        guidance_scale=args.guidance_scale,
        prompt_size=args.prompt_size,
        sample_size=args.sample_size,
        vae_batch_size=args.vae_batch_size,
        seed=args.seed,
        compat=args.compat,
        device=args.device,
        precision=args.precision,
        **others,
    )
