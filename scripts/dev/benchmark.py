"""Measure, side by side with a baseline; ``--help`` has the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarking import NONE, PLAIN
from diffnext.cli.parsing import command_parser

DESCRIPTION = """\
Measure sampling and training, beside a baseline.

    python scripts/dev/benchmark.py generate --model assets/nova-tiny --sets 64 --steps 25
    python scripts/dev/benchmark.py generate --config configs/nova_d48w768_sdxl1024.yaml --size 256
    python scripts/dev/benchmark.py train --size 256 --batch 2  # of nova_d48w768_sdxl1024
    python scripts/dev/benchmark.py generate --baseline /path/to/folder/with/another/diffnext

Weights are random and the same on both sides. The two sides are processes that take turns, run by
run, so that both see the same machine; the table has medians, the span of the runs and the ratio of
medians. The baseline of generate and train is, by default, NOVA as its specification words it
(tests/reference_nova.py). A path is the folder of another ``diffnext`` package, on which the same
public calls are made; none measures one side only.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    # Here, because it takes seconds that --help does not need.
    from benchmarking import measuring

    try:
        with tempfile.TemporaryDirectory() as scratch:
            results = [
                measuring.measure(args, name, spec, Path(scratch))
                for name, spec in measuring.make_specs(args, Path(scratch)).items()
            ]
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    machine = measuring.describe_machine(args)
    report = {"machine": machine, "arguments": vars(args), "results": results}
    print(measuring.format_report(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.baseline not in (PLAIN, NONE) and not (Path(args.baseline) / "diffnext").is_dir():
        parser.error(f"--baseline {args.baseline} holds no folder diffnext")
    if args.runs < 1 or args.warmup < 0:
        parser.error("--runs must be at least 1, --warmup at least 0")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("benchmark.py", DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="sampling")
    add_model_options(generate)
    generate.add_argument("--sets", type=int, default=16, help="of tokens per frame (16)")
    generate.add_argument("--steps", type=int, default=25, help="of diffusion per set (25)")
    generate.add_argument("--guidance", type=float, default=5.0, help="(5)")
    generate.add_argument(
        "--prepack", action="store_true", help="lay out the weights of our side for a CPU"
    )
    train = commands.add_parser("train", help="training steps")
    add_model_options(train)
    train.add_argument(
        "--levels", type=int, nargs="+", default=[0], help="of gradient checkpointing, each (0)"
    )
    for command in (generate, train):
        add = command.add_argument
        add("--baseline", default=PLAIN, help="plain, none, or a folder (plain)")
        add("--runs", type=int, default=5, help="measured per side (5)")
        add("--warmup", type=int, default=1, help="runs before, not measured (1)")
        add("--threads", type=int, default=os.cpu_count(), help="of PyTorch (all cores)")
        add("--output", type=Path, help="JSON file with everything measured")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of works with a model."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help="training config with the model's sizes")
    source.add_argument("--model", type=Path, help="release folder with the model's sizes")
    add = parser.add_argument
    add("--size", type=int, nargs="+", help="pixels (the config's)")
    add("--arch", nargs=3, help="names of the three parts (the config's)")
    add("--frames", type=int, help="latent frames (9 for videos, else 1)")
    add("--compile", action="store_true", help="compile the blocks of our side")
    add("--scheduler", choices=("flow", "ddpm"), default="flow", help="(flow)")
    add("--device", default="cpu", help="cpu, cuda (cpu)")
    add("--dtype", default="float32", help="float32, bfloat16, float16 (float32)")
    add("--batch", type=int, default=1, help="samples at once (1)")


if __name__ == "__main__":
    sys.exit(main())
