"""``diffnext init``: a release folder with a freshly initialised NOVA."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffnext.cli.parsing import command_parser, run

DESCRIPTION = """\
Write a release folder with a freshly initialised NOVA, ready to be trained from scratch.

  diffnext init --config configs/nova_photos_t2i.yaml --output DIR --tiny
  diffnext init --config configs/nova_d48w1024_sdxl1024.yaml --output DIR \\
    --vae SDXL_VAE --text-encoder PHI2 --tokenizer PHI2_TOKENIZER

The transformer is built from `pipeline.paths.module_config.transformer` of the config; the frozen
components are copied. With --tiny they are small: a random Phi and a byte-level tokenizer, which
tell prompts apart, and the fitted autoencoder of assets/ that has as many latent channels as the
config asks for. A class-conditional model has no text encoder and no tokenizer.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit code."""
    args = build_parser().parse_args(argv)
    from diffnext.pipelines.fresh_folder import write_folder

    return run(lambda: write_folder(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext init", DESCRIPTION)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="training config (YAML)")
    add("--output", type=Path, required=True, help="folder to write; must be new or empty")
    add("--tiny", action="store_true", help="small frozen components")
    add("--vae", type=Path, help="folder of the autoencoder to copy")
    add("--text-encoder", type=Path, help="folder of the Phi text encoder to copy")
    add("--tokenizer", type=Path, help="folder of the tokenizer to copy")
    add(
        "--weights",
        type=Path,
        help="folder of a trained model to start from; what it does not have, such as the motion "
        "of a picture model that is to learn clips, is initialised",
    )
    add(
        "--scheduler",
        choices=("flow", "ddpm"),
        default="flow",
        help="how tokens are denoised (flow matching)",
    )
    add(
        "--shift",
        type=float,
        default=1.0,
        help="timestep shift of flow matching towards high noise, in training and sampling (1)",
    )
    add(
        "--branch-gain",
        type=float,
        default=1.0,
        help="weights of the norms that end the encoders' residual branches; 0, as in Swin V2, "
        "learns faster from scratch (1, as PyTorch initialises)",
    )
    add("--seed", type=int, default=0, help="of the initial weights (0)")
    return parser
