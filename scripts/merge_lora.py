"""Merge trained adapters into their model.

    python scripts/merge_lora.py CHECKPOINT OUTPUT

CHECKPOINT is a checkpoint of a run with `model.lora`, or of its average. OUTPUT becomes an ordinary
release folder: it loads without peft, and can be trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.pipelines.release_folder import LORA_FILE, read_class_name

PIPELINES = {cls.__name__: cls for cls in (NOVAPipeline, NOVAC2IPipeline)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder with " + LORA_FILE)
    parser.add_argument("output", type=Path, help="folder to write; must be new")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights")
    args = parser.parse_args(argv)
    if not (args.checkpoint / LORA_FILE).is_file():
        parser.error(f"{args.checkpoint} has no {LORA_FILE}")
    if args.output.exists():
        parser.error(f"{args.output} exists already")
    merge(args.checkpoint, args.output, DTYPES[args.dtype])
    print(f"Wrote {args.output}")


def merge(checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the whole pipeline with merged weights.

    Args:
        checkpoint: Folder with adapters.
        output: Folder to write.
        dtype: Of the weights that are written; the sum is done in float32.
    """
    name = read_class_name(checkpoint)
    if name not in PIPELINES:
        raise ValueError(f"{checkpoint} must hold a {' or a '.join(PIPELINES)}, got {name}")
    pipeline_class = PIPELINES[name]
    pipe = pipeline_class.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.to(dtype=dtype).save_pretrained(output)


if __name__ == "__main__":
    main()
