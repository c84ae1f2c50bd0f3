"""Draw the videos of VBench (arXiv:2311.17982), in the layout of its standard suite.

    python scripts/sample_vbench.py --prompt prompts.json --prompt_key dense_prompt \
        --ckpt BAAI/nova-d48w1024-osp480 --outdir vbench/nova
    torchrun --nproc_per_node 8 scripts/sample_vbench.py --prompt prompts_rewrite.pth ...

Writes OUTDIR/<tag>/<prompt>-<sample>.mp4, 12 frames a second. What is there already is not drawn
again, so that the same command goes on after a stop. docs/evaluation.md says how prompts.json is
made of the benchmark's own files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffnext.evaluation.layouts import VBenchLayout
from diffnext.evaluation.prompts import read_vbench
from diffnext.evaluation.sampling import (
    Shard,
    add_sampling_arguments,
    draw_benchmark,
    options_from,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompt", required=True, help="prompts.json, or text states of encode_prompts.py (.pth)"
    )
    parser.add_argument("--max_latent_length", type=int, default=9, help="latent frames (9)")
    parser.add_argument("--flow", type=float, default=5.0, help="motion strength (5)")
    add_sampling_arguments(parser, prompt_size=8, sample_size=5, vae_batch_size=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        prompts = read_vbench(args.prompt, args.prompt_key)
        layout = VBenchLayout(args.outdir, prompts.texts, prompts.tags)
        options = options_from(args, max_latent_length=args.max_latent_length, flow=args.flow)
        count = draw_benchmark(prompts, layout, options, Shard.from_environment())
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {count} videos to {layout.outdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
