"""The dry run: everything about a run that can be known without training.

Nothing is written to the output folder. The report says what the model, the data and a step amount
to, what fits on which number of GPUs, and what would keep the run from starting.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import DictConfig, OmegaConf

from diffnext.engine.data_check import count_holdout
from diffnext.engine.engine_utils import synchronize_device
from diffnext.engine.memory import (
    ENGINES,
    FLOAT32,
    BatchShape,
    Engine,
    MemoryEstimate,
    ParameterCounts,
    StepMemory,
    estimate_memory,
    simulate_step,
)
from diffnext.engine.preflight import find_problems
from diffnext.engine.run_facts import (
    DatasetFacts,
    ModelFacts,
    batch_shape,
    checkpoints_kept,
    device_bytes,
    fits_model,
    inspect_dataset,
    inspect_model,
    optimizer_states,
    shard_sizes,
)
from diffnext.engine.train_engine import Trainer, find_resume
from diffnext.utils.accelerate_utils import (
    get_ddp_shards,
    normalize_precision,
    precision_to_dtype,
)
from diffnext.utils.omegaconf_utils import ConfigError

__all__ = ["dry_run", "memory_table", "time_steps"]

logger = logging.getLogger(__name__)

GIB = 2**30
MB = 1e6
SHOWN_PROCESSES = (1, 8, 128)
TIMED_STEPS = 3
# Of a GPU's memory; the rest is for the CUDA context, libraries and fragmentation.
USABLE_SHARE = 0.92
PARTS = {
    "video encoder": ("video_encoder",),
    "image encoder": ("image_encoder",),
    "decoder MLP": ("image_decoder",),
}
ENGINE_NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run was started.

    Attributes:
        engine: What distributes it.
        num_processes: Processes in all.
        local_processes: Processes on this machine.
        device: Of this process.
        dtype: Training dtype.
    """

    engine: Engine
    num_processes: int
    local_processes: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, config: DictConfig, accelerator: Accelerator | None) -> Launch:
        """Read it off the accelerator; None is one process on the best device here."""
        dtype = precision_to_dtype(normalize_precision(config.training.get("mixed_precision")))
        if accelerator is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return cls(engine="ddp", num_processes=1, local_processes=1, device=device, dtype=dtype)
        engines: dict[DistributedType, Engine] = {
            DistributedType.DEEPSPEED: "zero2",
            DistributedType.FSDP: "fsdp2",
        }
        return cls(
            engine=engines.get(accelerator.distributed_type, "ddp"),
            num_processes=accelerator.num_processes,
            local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)),
            device=accelerator.device,
            dtype=dtype,
        )

    @property
    def usable_bytes(self) -> int:
        """Memory that one process may take."""
        total = device_bytes(self.device)
        if self.device.type == "cpu":
            return int(USABLE_SHARE * total) // self.local_processes
        return int(USABLE_SHARE * total)


def dry_run(
    config: DictConfig,
    accelerator: Accelerator | None = None,
    report: Callable[[str], Any] = logger.info,
) -> bool:
    """Report on a run without training.

    Args:
        config: Training configuration with its defaults; left as it is.
        accelerator: Of the launched processes; None for one.
        report: Called on the main process with each paragraph.

    Returns:
        Whether the run can start and fits, the same on every process.
    """
    is_main = accelerator is None or accelerator.is_main_process
    launch = Launch.of(config, accelerator)
    problems: list[str] = []
    if is_main:
        for paragraph in _inspect(config, launch, problems):
            report(paragraph)
    can_start = _agree(accelerator, not problems)
    measured, failure = _measure(config, accelerator, can_start)
    if failure is not None:
        problems.append(failure)
    if is_main:
        report(measured)
        report(_conclude(problems))
    return _agree(accelerator, not problems)


def time_steps(
    config: DictConfig, accelerator: Accelerator, steps: int = TIMED_STEPS
) -> list[float]:
    """Do some real optimizer steps from the base weights; nothing is saved.

    Args:
        config: Training configuration.
        accelerator: Of the launched processes.
        steps: How many to time, after one that warms up.

    Returns:
        Seconds of each.
    """
    config = config.copy()
    config.experiment.resume_from_checkpoint = ""
    params = config.train_dataloader.params
    if params.get("shard_id") is None:
        params.update(get_ddp_shards(accelerator))
    accumulation = config.training.gradient_accumulation_steps
    seconds = []
    with contextlib.closing(Trainer(config, accelerator, logger)) as trainer:
        for _ in range(1 + steps):
            start = time.perf_counter()
            trainer.run_step(accumulation)
            synchronize_device(accelerator.device)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _inspect(config: DictConfig, launch: Launch, problems: list[str]) -> Iterator[str]:
    """Yield the paragraphs that need no training; add what is wrong to ``problems``."""
    yield _describe_launch(config, launch)
    problems += find_problems(config)
    try:
        resume = find_resume(config)
        yield f"Starts {'afresh' if resume is None else f'from {resume.checkpoint}'}"
    except ConfigError as error:
        problems.append(str(error))
    try:
        model = inspect_model(config)
    except (KeyError, TypeError, ValueError) as error:
        if not problems:
            problems.append(f"pipeline.paths.module_config.transformer: {error}")
        return
    problems += model.problems
    dataset = inspect_dataset(config)
    is_assumed = dataset is None or not fits_model(model.config, dataset)
    batch = batch_shape(config.training.batch_size, model.config, dataset)
    yield _describe_parameters(model)
    yield _describe_data(config, launch, dataset)
    yield _describe_step(config, launch, model, batch, is_assumed=is_assumed)
    yield _describe_memory(config, launch, model, batch, problems)
    yield _describe_disk(config, launch, ParameterCounts.of(model.make()), problems)


def _describe_launch(config: DictConfig, launch: Launch) -> str:
    total = device_bytes(launch.device) / GIB
    return (
        f"Dry run of {config.experiment.get('name') or config.config}: "
        f"{launch.num_processes} x {launch.device.type} ({total:.1f} GiB), "
        f"{ENGINE_NAMES[launch.engine]}, {str(launch.dtype).removeprefix('torch.')}"
    )


def _describe_parameters(facts: ModelFacts) -> str:
    model = facts.make()
    lines = ["Parameters (millions)        all  trained"]
    named = dict(model.named_children())
    rest = set(named)
    rows = []
    for title, names in PARTS.items():
        rows.append((title, [named[name] for name in names]))
        rest -= set(names)
    rows.append(("rest", [named[name] for name in sorted(rest)]))
    for title, modules in rows:
        lines.append(_parameter_line(title, modules))
    lines.append(_parameter_line("in all", [model]))
    for name, count in facts.frozen_parameters.items():
        lines.append(f"  {name + ', frozen':<22}{count / 1e6:>9.2f}")
    return "\n".join([*lines, *(f"  note: {note}" for note in facts.notes)])


def _parameter_line(title: str, modules: list[torch.nn.Module]) -> str:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    return f"  {title:<22}{total / 1e6:>9.2f}{trained / 1e6:>9.2f}"


def _describe_data(config: DictConfig, launch: Launch, dataset: DatasetFacts | None) -> str:
    if dataset is None:
        return "Data: not readable"
    lines = [
        f"Data: {dataset.num_examples} examples; moments {dataset.moments} {dataset.dtype}; "
        f"{dataset.prompt}; {dataset.record_bytes / MB:.2f} MB each"
    ]
    holdout = OmegaConf.select(config, "validation.holdout")
    num_held_out = count_holdout(holdout, dataset.num_examples)
    if num_held_out:
        lines.append(f"  {num_held_out} of them, the last, are held out for validation")
    try:
        size, last = shard_sizes(dataset.num_examples - num_held_out, launch.num_processes)
    except ValueError:  # of the problems
        return lines[0]
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps
    max_steps = config.training.max_train_steps
    lines += [
        f"  {launch.num_processes} shards of {size} examples"
        + (f", the last of {last}" if last != size else ""),
        f"  {math.ceil(size / per_step)} steps an epoch; "
        f"{max_steps} steps are {max_steps * per_step / size:.2f} epochs",
        f"  each process reads {per_step * dataset.record_bytes / MB:.2f} MB a step",
    ]
    return "\n".join(lines)


def _describe_step(
    config: DictConfig, launch: Launch, facts: ModelFacts, batch: BatchShape, is_assumed: bool
) -> str:
    model = facts.make()
    rows, columns = batch.latent_size
    counts = {}
    for name, encoder in (("video", model.video_encoder), ("image", model.image_encoder)):
        patch = encoder.patch_embed.patch_size
        counts[name] = batch.frames * (rows // patch) * (columns // patch)
    accumulation = config.training.gradient_accumulation_steps
    samples = batch.size * accumulation * launch.num_processes
    condition = model.text_embed.num_tokens if model.text_embed is not None else 1
    loss_tokens = counts["image"] * model.loss_repeat
    return "\n".join(
        [
            f"A sample: {batch.frames} x {rows} x {columns} latents"
            + (", assumed, as no fitting records can be read" if is_assumed else ""),
            f"Tokens a sample: {counts['video']} in the video encoder and {counts['image']} in the "
            f"image encoder, {condition} of condition; {loss_tokens} in the loss "
            f"({model.loss_repeat} noise levels)",
            f"Optimizer step: {samples} samples ({batch.size} x {accumulation} micro-batches x "
            f"{launch.num_processes} processes), {samples * counts['image']} image tokens",
        ]
    )


def _describe_memory(
    config: DictConfig,
    launch: Launch,
    facts: ModelFacts,
    batch: BatchShape,
    problems: list[str],
) -> str:
    device_type = launch.device.type
    own = memory_table(
        config, facts, batch, device_type, [launch.num_processes], engines=[launch.engine]
    )[launch.engine, launch.num_processes]
    usable = launch.usable_bytes
    if own.peak > usable:
        problems.append(
            f"does not fit: {own.peak / GIB:.1f} GiB are needed on each {device_type}, "
            f"{usable / GIB:.1f} GiB can be used (training.batch_size, "
            "model.gradient_checkpointing, another engine)"
        )
    processes = sorted({*SHOWN_PROCESSES, launch.num_processes})
    estimates = memory_table(config, facts, batch, "cuda", processes)
    level = config.model.get("gradient_checkpointing", 0)
    lines = [
        f"Memory: {own.peak / GIB:.2f} GiB on each {device_type} of this launch, "
        f"{usable / GIB:.1f} GiB can be used",
        f"Memory of a GPU in GiB, batch {batch.size}, checkpointing level {level}:",
        format_memory(estimates, usable if device_type == "cuda" else None),
    ]
    if config.get("ema") and OmegaConf.select(config, "ema.params.device") == "cpu":
        size = _ema_bytes(ParameterCounts.of(facts.make()))
        lines.append(f"  and {size / GIB:.2f} GiB of main memory for the EMA of process 0")
    return "\n".join(lines)


def memory_table(
    config: DictConfig,
    facts: ModelFacts,
    batch: BatchShape,
    device_type: str,
    processes: Sequence[int],
    engines: Sequence[Engine] = ENGINES,
) -> dict[tuple[Engine, int], MemoryEstimate]:
    """Estimate the memory of engines on several numbers of processes.

    Args:
        config: Training configuration.
        facts: Model and frozen components.
        batch: Shapes of the micro-batch.
        device_type: "cuda" or "cpu".
        processes: Numbers of processes.
        engines: Engines.

    Returns:
        Bytes on the main process's device, by engine and number of processes.
    """
    dtype = precision_to_dtype(normalize_precision(config.training.get("mixed_precision")))
    states = optimizer_states(config)
    estimates = {}
    for engine in engines:
        model = facts.make()
        counts = ParameterCounts.of(model)
        on_device = device_type == "cpu" or OmegaConf.select(config, "ema.params.device") != "cpu"
        step: StepMemory = simulate_step(
            model, batch, engine=engine, dtype=dtype, device_type=device_type
        )
        for number in processes:
            estimates[engine, number] = estimate_memory(
                engine,
                number,
                counts=counts,
                step=step,
                dtype=dtype,
                optimizer_states=states,
                frozen_bytes=dtype.itemsize * sum(facts.frozen_parameters.values()),
                ema_bytes=_ema_bytes(counts) if config.get("ema") and on_device else 0,
                is_accumulating=config.training.gradient_accumulation_steps > 1,
            )
    return estimates


def format_memory(
    estimates: Mapping[tuple[Engine, int], MemoryEstimate], usable: int | None = None
) -> str:
    """A Markdown table of estimates, in GiB.

    Args:
        estimates: From :func:`memory_table`.
        usable: Bytes a process may take; with them, a column tells what fits.
    """
    titles = "engine, processes, weights, gradients, optimizer, engine buffers, activations, frozen"
    header = [*titles.split(", "), "EMA", "peak"] + (["fits"] if usable is not None else [])
    lines = [_row(header), "|---" * len(header) + "|"]
    for (engine, number), e in sorted(estimates.items(), key=lambda item: item[0][1]):
        parts = [e.weights, e.gradients, e.optimizer, e.buffers, e.activations, e.frozen, e.ema]
        cells = [ENGINE_NAMES[engine], number, *(f"{part / GIB:.2f}" for part in (*parts, e.peak))]
        if usable is not None:
            cells.append("yes" if e.peak <= usable else "NO")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _ema_bytes(counts: ParameterCounts) -> int:
    return FLOAT32 * counts.total + counts.buffers


def _describe_disk(
    config: DictConfig, launch: Launch, counts: ParameterCounts, problems: list[str]
) -> str:
    """Size of the checkpoints against the free disk."""
    is_lora = bool(config.model.get("lora"))
    saved = counts.trainable if is_lora else counts.total
    masters = FLOAT32 * saved
    moments = int(FLOAT32 * optimizer_states(config) * counts.trainable)
    average = FLOAT32 * saved if config.get("ema") else 0
    each = launch.dtype.itemsize * saved + masters + moments + average
    number = checkpoints_kept(config)
    folder = Path(config.experiment.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if each * number > free:
        problems.append(
            f"does not fit: {number} checkpoints of {each / GIB:.2f} GiB each, {free / GIB:.1f} "
            f"GiB free at {existing} (checkpoint.keep_last, experiment.save_every)"
        )
    return (
        f"Disk: {each / GIB:.2f} GiB a checkpoint, at most {number} at a time are "
        f"{each * number / GIB:.1f} GiB; {free / GIB:.1f} GiB free at {existing}"
    )


def _measure(
    config: DictConfig, accelerator: Accelerator | None, can_start: bool
) -> tuple[str, str | None]:
    """Time real steps if the run can start; returns the report and what went wrong."""
    if not can_start:
        return "Step time: not measured: the run cannot start as it is, see below", None
    if accelerator is None:
        return "Step time: not measured: there is no accelerator to run on", None
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    try:
        seconds = time_steps(config, accelerator)
    except (RuntimeError, ValueError, OSError) as error:
        return "Step time: not measured: a step failed, see below", f"a real step failed: {error}"
    median = statistics.median(seconds)
    samples = (
        config.training.batch_size
        * config.training.gradient_accumulation_steps
        * accelerator.num_processes
    )
    days = median * config.training.max_train_steps / 86400
    text = (
        f"Step time: {median:.3f} s (median of {len(seconds)}: {min(seconds):.3f} to "
        f"{max(seconds):.3f}), {samples / median:.1f} samples/s; "
        f"{config.training.max_train_steps} steps take {days:.2f} days"
    )
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(accelerator.device)
        text += f"\nMeasured peak memory: {peak / GIB:.2f} GiB"
    return text, None


def _conclude(problems: list[str]) -> str:
    if not problems:
        return "Ready: nothing found that would stop this run"
    return "\n".join(["This run cannot start or finish, because", *(f"  - {p}" for p in problems)])


def _agree(accelerator: Accelerator | None, value: bool) -> bool:
    """Whether a value is true on every process."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    flag = torch.tensor(int(value), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") == accelerator.num_processes)
