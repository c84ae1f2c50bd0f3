"""Memory of trainings and drawings: computed for large models, and compared with real small ones.

    python scripts/dev/check_memory.py tables configs/nova_d48w768_sdxl1024.yaml
    python scripts/dev/check_memory.py measure
    python scripts/dev/check_memory.py measure --work drawing recorded
    python scripts/dev/check_memory.py measure --device cuda

tables: memory and traffic of training configs on 1, 8 and 128 GPUs, as docs/scaling.md shows them.
Everything is computed, and no GPU is needed.

measure: the memory of real training steps and drawings beside the simulated one. Each case runs in
its own process. "training" is two steps on random latents, as one process of the trainer takes
them: float32 weights, autocast, AdamW. "drawing" is sets of 25 steps with guidance, and "recorded"
the same by programs that keep their inputs and results, as CUDA graphs do (on a CPU they are called
again). On a CPU the peak is the process's high-water mark (VmHWM) less its size before the model is
built; freed memory is given back at once (MALLOC_ARENA_MAX, MALLOC_TRIM_THRESHOLD_,
MALLOC_MMAP_THRESHOLD_), as the allocator would otherwise keep some. On a GPU it is
torch.cuda.max_memory_allocated. Training draws the share of hidden tokens at random; here it is
always the smallest, which needs the most memory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarking.tables import print_head, print_row
from diffnext.cli.parsing import command_parser
from diffnext.config.load import parse, read_config
from diffnext.config.schema import TrainConfig
from diffnext.engine import dry_run, memory
from diffnext.engine.run_inputs import inspect_inputs
from diffnext.models.capture import Programs, Recorded, record_calls, record_cuda_graph
from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova import sampling
from diffnext.pipelines.pipeline_utils import cosine_set_sizes
from diffnext.schedulers.denoising_run import DenoisingRun
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.utils.accelerate_utils import precision_to_dtype

aten = torch.ops.aten
ATTENTION = {  # as the simulation runs it; the counter has only the GPU's kernels
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
PROCESSES = (1, 8, 128)
GPU = 80 * 2**30  # bytes
SMALL = ("vit_d3w192", "vit_d6w192", "mlp_d3w192")
LARGE = ("vit_d16w768", "vit_d32w768", "mlp_d6w768")
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One model and batch."""

    arch: tuple[str, ...]
    image_size: int
    batch_size: int
    dtype: str = "float32"
    level: int = 0
    device: str = "cpu"
    work: str = "training"
    sets: int = 16


CASES = {  # by device; those of a CPU are shown in docs/scaling.md
    "cpu": (
        Case(SMALL, 512, 16),
        Case(SMALL, 512, 16, level=3),
        Case(LARGE, 256, 4),
        Case(SMALL, 256, 16, dtype="bfloat16"),
        Case(SMALL, 512, 16, work="drawing", sets=4),
        Case(SMALL, 512, 16, work="recorded", sets=4),
    ),
    "cuda": (
        Case(LARGE, 1024, 4, "bfloat16", device="cuda"),
        Case(LARGE, 1024, 4, "bfloat16", level=3, device="cuda"),
        Case(LARGE, 1024, 4, "bfloat16", device="cuda", work="drawing", sets=8),
        Case(LARGE, 1024, 4, "bfloat16", device="cuda", work="recorded", sets=8),
    ),
}
WORKS = ("training", "drawing", "recorded")
STEPS = 25  # of each set


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("check_memory.py", __doc__)
    commands = parser.add_subparsers(required=True)
    tables = commands.add_parser("tables", help="computed, of training configs")
    tables.add_argument("configs", type=Path, nargs="+", help="training configs (YAML)")
    tables.set_defaults(run=print_tables)
    measured = commands.add_parser("measure", help="of small models")
    measured.add_argument("--work", nargs="+", choices=WORKS, default=WORKS, help="(all)")
    measured.add_argument("--device", default="cpu", choices=CASES, help="(cpu)")
    measured.set_defaults(run=print_measured)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_args(argv)
    args.run(args)


# --- measured -----------------------------------------------------------------------------------


def print_measured(args: argparse.Namespace) -> None:
    """Print the table."""
    names = ("work", "model", "px", "batch", "dtype", "level")
    print_head(*names, "simulated, GiB", "measured, GiB", "ratio")
    for case in CASES[args.device]:
        if case.work not in args.work:
            continue
        simulated, measured = simulate(case), run_child(case)
        sizes = (case.image_size, case.batch_size, case.dtype, case.level)
        figures = (f"{simulated / GIB:.2f}", f"{measured / GIB:.2f}", f"{simulated / measured:.3f}")
        print_row(case.work, " ".join(case.arch), *sizes, *figures)


def model_config(case: Case) -> dict[str, Any]:
    """Arguments of the model: an image model on latents of 8 pixels a side."""
    tokens = case.image_size // 16
    return {
        "image_dim": 4,
        "image_size": [case.image_size] * 2,
        "image_stride": 8,
        "text_token_dim": 2560,
        "text_token_len": 256,
        "image_base_size": [tokens] * 2,
        "video_base_size": [1, tokens // 2, tokens // 2],
        "arch": list(case.arch),
    }


def simulate(case: Case) -> int:
    """The peak in bytes, of one process, by running without data."""
    return simulate_training(case) if case.work == "training" else simulate_drawing(case)[0]


def simulate_training(case: Case) -> int:
    """What the dry run says."""
    dtype = getattr(torch, case.dtype)
    model = memory.make_meta_model(model_config(case), gradient_checkpointing=case.level)
    counts = memory.ParameterCounts.of(model)
    batch = memory.BatchShape(
        size=case.batch_size, frames=1, latent_size=(case.image_size // 8,) * 2
    )
    step = memory.simulate_step(model, batch, engine="ddp", dtype=dtype, device_type=case.device)
    return memory.estimate_memory("ddp", 1, counts=counts, step=step, dtype=dtype).peak


def simulate_drawing(case: Case) -> tuple[int, int]:
    """Peak of a drawing, and what of it recorded programs keep: their inputs and results."""
    run = make_run()
    run.scheduler.timesteps = [float(time) for time in run.scheduler.timesteps]
    programs = WithoutData(lambda function, pool: Recorded(lambda: None, function()))
    limits = sampling.MAX_MODULATION_BYTES  # tensors without data pass for tensors of the CPU
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.dict(limits, cpu=limits[case.device]),
    ):
        model = make_drawing_model(case)
        weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        model.programs = programs if case.work == "recorded" else None
        with memory.LiveBytes(model) as live:
            draw(model, case, run)
    return weights + live.most, programs.nbytes


class WithoutData(Programs):
    """Programs of a model whose weights lie nowhere."""

    def prepare(self, model: nn.Module) -> None:
        """Nothing to forget."""


def run_child(case: Case) -> int:
    """Measure a case in a fresh process."""
    with mock.patch.dict(os.environ, ALLOCATOR):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, case).result()


def measure(case: Case) -> int:
    """Do the work of a case.

    Returns:
        The peak in bytes, without what the process held before.
    """
    baseline = read_status("VmRSS") if case.device == "cpu" else 0
    torch.manual_seed(0)
    if case.work == "training":
        train(case)
    else:
        model = make_drawing_model(case)
        nn.Module.to(model, case.device)
        if case.work == "recorded":
            model.programs = Programs(record_cuda_graph if case.device == "cuda" else record_calls)
        draw(model, case, make_run())
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return read_status("VmHWM") - baseline


def make_drawing_model(case: Case) -> NOVATransformer3DModel:
    """A model whose weights are made in the dtype of the case."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        return NOVATransformer3DModel(**model_config(case)).eval()
    finally:
        torch.set_default_dtype(before)


def make_run() -> sampling.GenerationRun:
    """A drawing by flow matching."""
    return sampling.GenerationRun(DenoisingRun(FlowMatchEulerDiscreteScheduler(), STEPS))


def draw(model: NOVATransformer3DModel, case: Case, run: sampling.GenerationRun) -> None:
    """Draw with guidance."""
    weight = model.mask_embed.bos_token
    states = torch.zeros(256, 2560, dtype=weight.dtype, device=weight.device)
    request = sampling.GenerationRequest(
        latent_shape=(case.batch_size, *model.image_encoder.latent_shape),
        num_preds=tuple(cosine_set_sizes(case.sets, (case.image_size // 16) ** 2).tolist()),
        prompt=[states] * (2 * case.batch_size),
        guidance=GuidanceScaler(guidance_scale=5),
    )
    list(sampling.generate_frames(model, request, run))


def train(case: Case) -> None:
    """Train two steps, the second with optimizer state."""
    model = NOVATransformer3DModel(**model_config(case)).to(case.device).train()
    model.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    model.set_gradient_checkpointing(case.level)
    memory.set_worst_mask(model)
    inputs = random_batch(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        train_step(model, inputs, optimizer, getattr(torch, case.dtype), case.device)


def random_batch(case: Case) -> dict[str, Tensor]:
    """Latents and text states."""
    side = case.image_size // 8
    return {
        "x": torch.randn(case.batch_size, 4, side, side, device=case.device),
        "prompt": torch.randn(case.batch_size, 256, 2560, device=case.device),
    }


def train_step(
    model: nn.Module,
    inputs: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Forward under autocast, backward, update."""
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(inputs)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def read_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# --- tables -------------------------------------------------------------------------------------


def print_tables(args: argparse.Namespace) -> None:
    """Print the tables of docs/scaling.md."""
    usable = int(GPU * dry_run.USABLE_SHARE)
    for path in args.configs:
        plan = make_plan(path)
        counts = memory.ParameterCounts.of(plan.make())
        batch = plan.batch_shape()
        print(f"### {path.stem}: {counts.total / 1e6:.0f} M parameters, batch {batch.size}\n")
        print(f"Forward and backward of a batch: {count_flops(plan) / 1e12:.0f} TFLOP.\n")
        print(dry_run.format_memory(dry_run.memory_table(plan, batch, "cuda", PROCESSES), usable))
        print(f"\nPeak at each checkpointing level on {PROCESSES[1]} GPUs:\n")
        print_levels(plan)
        print("\nSent by each GPU in one optimizer step, GB:\n")
        print_traffic(plan, counts)
        print()


def make_plan(path: Path) -> dry_run.ModelPlan:
    """The model of a training config; what the config names need not exist."""
    merged, _ = read_config([f"config={path}", "experiment.output_dir=."])
    config = parse(merged, TrainConfig)
    return dry_run.ModelPlan.of(config, inspect_inputs(config))


def set_level(plan: dry_run.ModelPlan, level: int) -> dry_run.ModelPlan:
    """The same model with another level of gradient checkpointing."""
    model = replace(plan.config.model, gradient_checkpointing=level)
    return replace(plan, config=replace(plan.config, model=model))


def count_flops(plan: dry_run.ModelPlan) -> int:
    """Floating-point operations of matrix products and attention, for one batch on one GPU."""
    with (
        mock.patch.dict(flop_registry, ATTENTION),
        FlopCounterMode(display=False, depth=0) as counter,
    ):
        memory.simulate_step(plan.make(), plan.batch_shape())
    return counter.get_total_flops()


def print_levels(plan: dry_run.ModelPlan) -> None:
    """Peak memory over levels and engines."""
    print_head("level", *(f"{dry_run.ENGINE_NAMES[engine]}, GiB" for engine in memory.ENGINES))
    number = PROCESSES[1]
    for level in range(4):
        estimates = dry_run.memory_table(
            set_level(plan, level), plan.batch_shape(), "cuda", [number]
        )
        print_row(
            level, *(f"{estimates[engine, number].peak / GIB:.1f}" for engine in memory.ENGINES)
        )


def print_traffic(plan: dry_run.ModelPlan, counts: memory.ParameterCounts) -> None:
    """Bytes on the wire over engines and numbers of GPUs."""
    itemsize = precision_to_dtype(plan.config.training.mixed_precision).itemsize
    numbers = [number for number in PROCESSES if number > 1]
    print_head("engine", *(f"{number} GPUs" for number in numbers))
    for engine in memory.ENGINES:
        sent = [traffic(engine, number, counts, itemsize) / 1e9 for number in numbers]
        print_row(dry_run.ENGINE_NAMES[engine], *(f"{value:.2f}" for value in sent))


def traffic(
    engine: memory.Engine, processes: int, counts: memory.ParameterCounts, itemsize: int
) -> float:
    """Bytes that each process sends in one optimizer step of one micro-batch, by ring algorithms.

    An all-reduce sends twice the share (N - 1) / N of the data, a reduce-scatter or an all-gather
    once. DDP all-reduces float32 gradients. ZeRO-2 reduces gradients to their owners and gathers
    the new weights, FSDP2 reduces gradients and gathers weights in forward and in backward, all in
    the training dtype.
    """
    passes = {
        "ddp": 2 * memory.FLOAT32 * counts.trainable,
        "zero2": itemsize * 2 * counts.trainable,
        "fsdp2": itemsize * (counts.trainable + 2 * counts.total),
    }
    return (processes - 1) / processes * passes[engine]


if __name__ == "__main__":
    main()
