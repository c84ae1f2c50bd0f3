"""Encode the prompts of a benchmark, so that sampling needs no text encoder.

    python scripts/encode_prompts.py --ckpt BAAI/nova-d48w1024-sdxl1024 \
        --prompts evaluation_metadata.jsonl --output prompts.pth
    python scripts/encode_prompts.py --ckpt BAAI/nova-d48w1024-osp480 --prompts prompts.json \
        --prompt_key dense_prompt --output prompts_rewrite.pth

Reads a JSON list or JSON lines of objects with `prompt` and perhaps `dense_prompt` and `tag`. The
file holds {"prompts": [states (k, d), ...], "tags": [...], "texts": [...]}: one tag, where there
are any, and one short text a prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diffnext.evaluation.prompts import (
    encode_prompts,
    prompts_of_records,
    read_records,
    save_states,
)
from diffnext.utils.device_utils import AUTO, PRECISIONS, parse_device, parse_precision


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="folder or Hub id with the text encoder")
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.pth)")
    parser.add_argument(
        "--prompt_key", default="prompt", help="text to encode: prompt or dense_prompt (prompt)"
    )
    parser.add_argument("--device", default=AUTO, help="cpu, cuda, ... (the best there is)")
    parser.add_argument(
        "--precision",
        default=AUTO,
        choices=(AUTO, *PRECISIONS),
        help="of the states (float16; on a CPU float32)",
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".pth":
        parser.error(f"--output must end with .pth, got {args.output}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        prompts = prompts_of_records(read_records(args.prompts), args.prompts, args.prompt_key)
        device = parse_device(args.device)
        dtype = parse_precision(args.precision, device)
        states = encode_prompts(args.ckpt, prompts.prompts, device, dtype)
        encoded = tuple(tqdm(states, total=len(prompts), unit="prompt"))
        save_states(args.output, replace(prompts, prompts=encoded))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.output}: {len(encoded)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
