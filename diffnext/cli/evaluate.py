"""``diffnext evaluate``: the samples of a benchmark, or the score of coloured shapes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from diffnext.cli.parsing import add_device_options, command_parser, run

if TYPE_CHECKING:  # takes seconds that --help does not need
    from diffnext.evaluation.layouts import Layout
    from diffnext.evaluation.prompts import PromptSet

DESCRIPTION = """\
Draw the samples of a benchmark, in the layout that its scorer reads.

  diffnext evaluate geneval --metadata evaluation_metadata.jsonl \\
    --ckpt BAAI/nova-d48w1024-sdxl1024 --outdir geneval/nova
  diffnext evaluate vbench --prompt prompts.json --prompt_key dense_prompt \\
    --ckpt BAAI/nova-d48w1024-osp480 --outdir vbench/nova
  torchrun --nproc_per_node 8 -m diffnext evaluate geneval ...
  diffnext evaluate shapes --model assets/nova-tiny

Samples that exist are not drawn again, so the same command continues after a stop. Prompts come
from the benchmarks' own repositories; docs/evaluation.md says how.
"""
GENEVAL = """\
Draw the pictures of GenEval (arXiv:2310.11513): OUTDIR/<prompt, 5 digits>/metadata.jsonl and
OUTDIR/<prompt>/samples/<sample, 5 digits>.png.
"""
SHAPES = Path(__file__).resolve().parents[2] / "scripts" / "nova_tiny"
VBENCH = """\
Draw the videos of VBench's standard suite (arXiv:2311.17982): OUTDIR/<tag>/<prompt>-<sample>.mp4,
12 frames per second.
"""
SEED = 1337  # the seeds of all samples are derived from it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["shapes"]:
        return score_shapes(words[1:])
    args = build_parser().parse_args(words)
    return run(lambda: args.draw(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext evaluate", DESCRIPTION)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    geneval = benchmarks.add_parser("geneval", help="pictures", description=GENEVAL)
    geneval.add_argument("--metadata", required=True, help="the benchmark's metadata (.jsonl)")
    states = "prompts.json, or text states of `diffnext encode` (.pth)"
    geneval.add_argument("--prompt", default="", help=f"{states} (the prompts of --metadata)")
    add_sampling_arguments(geneval, prompt_size=16, sample_size=4, vae_batch_size=16)
    geneval.set_defaults(draw=draw_geneval)
    vbench = benchmarks.add_parser("vbench", help="videos", description=VBENCH)
    vbench.add_argument("--prompt", required=True, help=states)
    vbench.add_argument("--max_latent_length", type=int, default=9, help="latent frames (9)")
    vbench.add_argument("--flow", type=float, default=5.0, help="motion strength (5)")
    add_sampling_arguments(vbench, prompt_size=8, sample_size=5, vae_batch_size=1)
    vbench.set_defaults(draw=draw_vbench)
    benchmarks.add_parser("shapes", help="coloured shapes, generated and scored (in a clone)")
    return parser


def score_shapes(words: Sequence[str]) -> int:
    """Run the script of a clone that generates and scores coloured shapes."""
    if not SHAPES.is_dir():
        print(
            "error: coloured shapes are scored by scripts/nova_tiny/evaluate_shapes.py, which is "
            "only there in a clone: install it with `pip install -e .`",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(SHAPES))
    return importlib.import_module("evaluate_shapes").main(words)


def add_sampling_arguments(
    parser: argparse.ArgumentParser, prompt_size: int, sample_size: int, vae_batch_size: int
) -> None:
    """Add the options that every benchmark has, to the parser; numbers are defaults."""
    add = parser.add_argument
    add(
        "--ckpt", type=nonempty, required=True, help="release folder, training checkpoint or Hub id"
    )
    add("--outdir", type=nonempty, required=True, help="folder; samples that exist are kept")
    add("--prompt_key", default="prompt", help="text to draw: prompt or dense_prompt (prompt)")
    add("--num_pred_steps", type=int, default=128, help="sets of tokens per frame (128)")
    add("--num_diff_steps", type=int, default=25, help="denoising steps of each (25)")
    add("--guidance_scale", type=float, default=7.0, help="weight of the prompt (7)")
    add("--prompt_size", type=int, default=prompt_size, help=f"prompts at once ({prompt_size})")
    add("--sample_size", type=int, default=sample_size, help=f"samples each ({sample_size})")
    add("--vae_batch_size", type=int, default=vae_batch_size, help=f"at once ({vae_batch_size})")
    add("--seed", type=int, default=SEED, help=f"of all samples ({SEED})")
    add(
        "--compat",
        action="store_true",
        help="one generator for the whole run, as in NOVA's first release",
    )
    add_device_options(parser)


def nonempty(text: str) -> str:
    """A text that is not empty: an empty path would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def draw_geneval(args: argparse.Namespace) -> None:
    """Draw pictures."""
    from diffnext.evaluation.layouts import GenEvalLayout
    from diffnext.evaluation.prompts import read_geneval

    prompts, records = read_geneval(args.metadata, args.prompt, args.prompt_key)
    draw(prompts, GenEvalLayout(args.outdir, records), args, "pictures")


def draw_vbench(args: argparse.Namespace) -> None:
    """Draw videos."""
    from diffnext.evaluation.layouts import VBenchLayout
    from diffnext.evaluation.prompts import read_vbench

    prompts = read_vbench(args.prompt, args.prompt_key)
    layout = VBenchLayout(args.outdir, prompts.texts or (), prompts.tags or ())
    draw(prompts, layout, args, "videos")


def draw(prompts: PromptSet, layout: Layout, args: argparse.Namespace, what: str) -> None:
    """Draw this process's share of a benchmark, and print how many samples it wrote."""
    from diffnext.evaluation.sampling import SamplingOptions, Shard, draw_benchmark
    from diffnext.utils.arguments import build_checked

    ckpt = Path(args.ckpt).expanduser()
    args.ckpt = str(ckpt.absolute()) if ckpt.exists() else args.ckpt
    names = {one.name for one in fields(SamplingOptions)}
    options = {name: value for name, value in vars(args).items() if name in names}
    shard = Shard.from_environment()
    count = draw_benchmark(prompts, layout, build_checked(SamplingOptions, options), shard)
    print(f"Wrote {count} {what} to {args.outdir}")
