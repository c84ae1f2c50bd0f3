"""``diffnext encode``: text states of a benchmark's prompts; sampling then needs no encoder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffnext.cli.parsing import add_device_options, command_parser, run

DESCRIPTION = """\
Encode the prompts of a benchmark; sampling then needs no text encoder.

  diffnext encode --ckpt BAAI/nova-d48w1024-sdxl1024 --prompts evaluation_metadata.jsonl \\
    --output prompts.pth
  diffnext encode --ckpt BAAI/nova-d48w1024-osp480 --prompts prompts.json \\
    --prompt_key dense_prompt --output prompts_rewrite.pth

Reads a JSON list or JSON lines of objects with `prompt` and perhaps `dense_prompt` and `tag`. The
file holds {"prompts": [states (k, d), ...], "tags": [...], "texts": [...]}: a tag, where there are
any, and a short text for each prompt.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    return run(lambda: encode(args))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("diffnext encode", DESCRIPTION)
    add = parser.add_argument
    add("--ckpt", required=True, help="folder or Hub id with the text encoder")
    add("--prompts", type=Path, required=True, help="file of prompts (JSON)")
    add("--output", type=Path, required=True, help="file to write (.pth)")
    add("--prompt_key", default="prompt", help="text to encode: prompt or dense_prompt (prompt)")
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != ".pth":
        parser.error(f"--output must end with .pth, got {args.output}")
    return args


def encode(args: argparse.Namespace) -> None:
    """Encode prompts and write their states."""
    from tqdm import tqdm

    from diffnext.evaluation.prompts import (
        encode_prompts,
        prompts_of_records,
        read_records,
        save_states,
    )
    from diffnext.utils.device_utils import parse_device, parse_precision

    prompts = prompts_of_records(read_records(args.prompts), args.prompts, args.prompt_key)
    device = parse_device(args.device)
    dtype = parse_precision(args.precision, device)
    states = encode_prompts(args.ckpt, [str(text) for text in prompts.prompts], device, dtype)
    encoded = tuple(tqdm(states, total=len(prompts), unit="prompt"))
    save_states(args.output, replace(prompts, prompts=encoded))
    print(f"Wrote {args.output}: {len(encoded)} prompts")
