"""Draw the pictures of GenEval (arXiv:2310.11513), in the layout that its scorer reads.

    python scripts/sample_geneval.py --metadata evaluation_metadata.jsonl \
        --ckpt BAAI/nova-d48w1024-sdxl1024 --outdir geneval/nova
    torchrun --nproc_per_node 8 scripts/sample_geneval.py --prompt prompts_rewrite.pth ...

Writes OUTDIR/<prompt, 5 digits>/metadata.jsonl and OUTDIR/<prompt>/samples/<sample, 5 digits>.png.
What is there already is not drawn again, so that the same command goes on after a stop. The
metadata comes from the benchmark's own repository; docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffnext.evaluation.layouts import GenEvalLayout
from diffnext.evaluation.prompts import read_geneval
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
    parser.add_argument("--metadata", required=True, help="the benchmark's metadata (.jsonl)")
    parser.add_argument(
        "--prompt",
        default="",
        help="prompts.json, or text states of encode_prompts.py (.pth); (those of --metadata)",
    )
    add_sampling_arguments(parser, prompt_size=16, sample_size=4, vae_batch_size=16)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        prompts, records = read_geneval(args.metadata, args.prompt, args.prompt_key)
        layout = GenEvalLayout(args.outdir, records)
        count = draw_benchmark(prompts, layout, options_from(args), Shard.from_environment())
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {count} pictures to {layout.outdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
