"""``diffnext lora``: merge trained adapters into their model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffnext.cli.parsing import command_parser, run

DESCRIPTION = """\
Merge trained adapters into their model.

  diffnext lora merge runs/mine/checkpoints/checkpoint-1000 merged
  diffnext lora merge runs/mine/ema_checkpoints/checkpoint-1000 merged --dtype float32

CHECKPOINT is a checkpoint of a run with `model.lora`, or of its average. OUTPUT becomes an ordinary
release folder: it loads without peft, and can be trained on. Its README.md, a model card, has the
header of the base model's.
"""
PRECISIONS = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run(lambda: merge(args.checkpoint, args.output, args.dtype))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext lora", DESCRIPTION)
    parser.add_argument("action", choices=("merge",), help="what to do")
    parser.add_argument("checkpoint", type=Path, help="folder with the adapters")
    parser.add_argument("output", type=Path, help="folder to write; must be new")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float16", help="of the weights")
    return parser


def merge(checkpoint: Path, output: Path, dtype: str) -> None:
    """Write the whole pipeline with merged weights.

    Args:
        checkpoint: Folder with adapters.
        output: Folder to write; must be new.
        dtype: Name of the type of the weights that are written; the sum is done in float32.

    Raises:
        ValueError: If there are no adapters, the output exists, or the base model's card cannot be
            read.
    """
    import torch

    from diffnext.pipelines.model_card import merged_card
    from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline
    from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
    from diffnext.pipelines.release_folder import LORA_FILE, read_class_name
    from diffnext.utils.messages import did_you_mean

    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}{did_you_mean(checkpoint)}")
    if not (checkpoint / LORA_FILE).is_file():
        wanted = "name a checkpoint of a run with model.lora"
        raise ValueError(f"{checkpoint} has no adapters ({LORA_FILE}): {wanted}")
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    pipelines = {cls.__name__: cls for cls in (NOVAPipeline, NOVAC2IPipeline)}
    name = read_class_name(checkpoint)
    if name not in pipelines:
        raise ValueError(f"{checkpoint} must hold a {' or a '.join(pipelines)}, got {name}")
    card = merged_card(checkpoint, output.name)
    pipe = pipelines[name].from_pretrained(checkpoint, dtype=torch.float32)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype=getattr(torch, dtype))  # diffusers' own warns of nothing
    pipe.save_pretrained(output)
    (output / "README.md").write_text(card, encoding="utf-8")
    print(f"Wrote {output}")
