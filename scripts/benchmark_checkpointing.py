"""Time and memory of one training step at each level of model.gradient_checkpointing.

    python scripts/benchmark_checkpointing.py --config configs/nova_tiny_t2v.yaml
    python scripts/benchmark_checkpointing.py --config configs/nova_d48w1024_osp480.yaml \
        --device cuda --dtype bfloat16

The model of the config is trained on random latents, each level in a process of its own; the
levels take turns. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarking.processes import run_script
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler

LEVELS = range(4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="training config (YAML)")
    parser.add_argument("--frames", type=int, help="latent frames (9 for videos, else 1)")
    parser.add_argument("--arch", nargs=3, help="other sizes than the config's, by name")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--dtype", default="float32", help="of weights and activations (float32)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps a turn (3)")
    parser.add_argument("--turns", type=int, default=2, help="processes a level (2)")
    parser.add_argument("--level", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure all levels, or one, in the child process."""
    args = parse_args(argv)
    if args.level is not None:
        print(json.dumps(measure(args)))
        return
    results: dict[int, list[dict[str, float]]] = {level: [] for level in LEVELS}
    for _ in range(args.turns):
        for level in LEVELS:
            results[level].append(run_level(level, argv or sys.argv[1:]))
    print_table(results)


def run_level(level: int, argv: list[str]) -> dict[str, float]:
    """Measure one level in a fresh process, so that its peak of memory is its own."""
    return run_script(__file__, *argv, "--level", str(level))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Train a few steps.

    Returns:
        ``seconds``, the median of a step, and ``megabytes``, the peak above the weights and
        gradients.
    """
    config = OmegaConf.to_container(OmegaConf.load(args.config), resolve=True)
    sizes = config["pipeline"]["paths"]["module_config"]["transformer"]
    sizes["arch"] = args.arch or sizes["arch"]
    torch.manual_seed(0)
    np.random.seed(0)
    dtype = getattr(torch, args.dtype)
    model = NOVATransformer3DModel(**sizes).to(args.device, dtype).train()
    model.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    model.set_gradient_checkpointing(args.level)
    inputs = random_batch(sizes, args, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_megabytes(args.device)
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        sum(model(inputs).values()).backward()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "megabytes": peak_megabytes(args.device) - before,
    }


def random_batch(sizes: dict, args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """One sample of the config's size."""
    frames = args.frames or (9 if sizes["video_base_size"][0] > 1 else 1)
    height, width = (side // sizes["image_stride"] for side in sizes["image_size"])
    x = torch.randn(1, sizes["image_dim"], frames, height, width)
    x = x.to(args.device, dtype)
    prompt = torch.randn(1, sizes["text_token_len"], sizes["text_token_dim"]).to(args.device, dtype)
    return {"x": x if frames > 1 else x.squeeze(2), "prompt": prompt, "motion_flow": [5.0]}


def peak_megabytes(device: str) -> float:
    """Most memory held so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def print_table(results: dict[int, list[dict[str, float]]]) -> None:
    """Print medians, spread and ratios to level 0."""
    print("| level | seconds a step | (spread) | x | activations, MB | x |")
    print("|---|---|---|---|---|---|")
    base_time, base_memory = None, None
    for level, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        time_of_level = statistics.median(seconds)
        memory = statistics.median(run["megabytes"] for run in runs)
        base_time = base_time or time_of_level
        base_memory = base_memory or memory
        print(
            f"| {level} | {time_of_level:.2f} | {min(seconds):.2f}-{max(seconds):.2f} | "
            f"{time_of_level / base_time:.2f} | {memory:.0f} | {memory / base_memory:.2f} |"
        )


if __name__ == "__main__":
    main()
