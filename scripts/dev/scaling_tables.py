"""The tables of docs/scaling.md: memory and traffic of training configs on 1, 8 and 128 GPUs.

    python scripts/dev/scaling_tables.py configs/nova_d48w768_sdxl1024.yaml \
        configs/nova_d48w1024_sdxl1024.yaml configs/nova_d48w1536_sdxl1024.yaml

Everything is computed, nothing is run and no GPU is needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from diffnext.config.load import parse, read_config
from diffnext.config.schema import TrainConfig
from diffnext.engine.dry_run import (
    ENGINE_NAMES,
    USABLE_SHARE,
    ModelPlan,
    format_memory,
    memory_table,
)
from diffnext.engine.memory import ENGINES, FLOAT32, Engine, ParameterCounts, simulate_step
from diffnext.engine.run_inputs import inspect_inputs
from diffnext.utils.accelerate_utils import precision_to_dtype

GIB = 2**30
GB = 1e9
PROCESSES = (1, 8, 128)
LEVELS = range(4)


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of attention, by shapes."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(
    gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    """Operations of its backward pass, by shapes."""
    return sdpa_backward_flop_count(gradient, q, k, v)


# Attention as the simulation runs it; the counter knows the GPU's kernels only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="+", help="training configs (YAML)")
    parser.add_argument("--level", type=int, default=0, help="gradient checkpointing (0)")
    parser.add_argument("--gpu", type=float, default=80, help="GiB of a GPU (80)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print all tables."""
    args = parse_args(argv)
    usable = int(args.gpu * USABLE_SHARE * GIB)
    for path in args.configs:
        plan = set_level(make_plan(path), args.level)
        counts = ParameterCounts.of(plan.make())
        batch = plan.batch_shape()
        print(f"### {path.stem}: {counts.total / 1e6:.0f} M parameters, batch {batch.size}\n")
        print(f"Forward and backward of a batch: {count_flops(plan) / 1e12:.0f} TFLOP.\n")
        print(format_memory(memory_table(plan, batch, "cuda", PROCESSES), usable))
        print(f"\nPeak at each checkpointing level on {PROCESSES[1]} GPUs:\n")
        print_levels(plan)
        print("\nSent by each GPU in one optimizer step, GB:\n")
        print_traffic(plan, counts)
        print()


def make_plan(path: Path) -> ModelPlan:
    """The model of a training config; what the config names need not exist."""
    merged, _ = read_config([f"config={path}", "experiment.output_dir=."])
    config = parse(merged, TrainConfig)
    return ModelPlan.of(config, inspect_inputs(config))


def set_level(plan: ModelPlan, level: int) -> ModelPlan:
    """The same model with another level of gradient checkpointing."""
    model = replace(plan.config.model, gradient_checkpointing=level)
    return replace(plan, config=replace(plan.config, model=model))


def count_flops(plan: ModelPlan) -> int:
    """Floating-point operations of matrix products and attention, for one batch on one GPU."""
    with FlopCounterMode(display=False, depth=0, custom_mapping=ATTENTION) as counter:
        simulate_step(plan.make(), plan.batch_shape())
    return counter.get_total_flops()


def print_levels(plan: ModelPlan) -> None:
    """Peak memory over levels and engines."""
    print_row(["level", *(f"{ENGINE_NAMES[engine]}, GiB" for engine in ENGINES)], is_header=True)
    for level in LEVELS:
        number = PROCESSES[1]
        estimates = memory_table(set_level(plan, level), plan.batch_shape(), "cuda", [number])
        print_row([level, *(f"{estimates[engine, number].peak / GIB:.1f}" for engine in ENGINES)])


def print_traffic(plan: ModelPlan, counts: ParameterCounts) -> None:
    """Bytes on the wire over engines and numbers of GPUs."""
    itemsize = precision_to_dtype(plan.config.training.mixed_precision).itemsize
    numbers = [number for number in PROCESSES if number > 1]
    print_row(["engine", *(f"{number} GPUs" for number in numbers)], is_header=True)
    for engine in ENGINES:
        sent = [traffic(engine, number, counts, itemsize) / GB for number in numbers]
        print_row([ENGINE_NAMES[engine], *(f"{value:.2f}" for value in sent)])


def traffic(engine: Engine, processes: int, counts: ParameterCounts, itemsize: int) -> float:
    """Bytes that each process sends in one optimizer step of one micro-batch, by ring algorithms.

    An all-reduce sends twice the share (N - 1) / N of the data, a reduce-scatter or an all-gather
    once. DDP all-reduces float32 gradients. ZeRO-2 reduces gradients to their owners and gathers
    the new weights, FSDP2 reduces gradients and gathers weights in forward and in backward, all in
    the training dtype.
    """
    passes = {
        "ddp": 2 * FLOAT32 * counts.trainable,
        "zero2": itemsize * 2 * counts.trainable,
        "fsdp2": itemsize * (counts.trainable + 2 * counts.total),
    }
    return (processes - 1) / processes * passes[engine]


def print_row(cells: list[Any], is_header: bool = False) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |")
    if is_header:
        print("|---" * len(cells) + "|")


if __name__ == "__main__":
    main()
