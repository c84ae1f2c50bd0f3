"""The dry run: what a run needs, found without training and without writing anything.

The report gives the size of the model, the data and a step, the memory on different numbers of
GPUs, and everything that would stop the run.
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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError, config_to_object, import_target
from diffnext.data.example_order import ExampleOrder, filled_shards
from diffnext.engine import memory
from diffnext.engine.base_folder import TransformerFacts, read_shapes
from diffnext.engine.control import Agreement
from diffnext.engine.dataset_facts import DatasetFacts
from diffnext.engine.engine_utils import synchronize_device
from diffnext.engine.memory import ENGINES, FLOAT32, BatchShape, Engine, MemoryEstimate
from diffnext.engine.resume import find_mismatches, find_resume_point
from diffnext.engine.run_inputs import Findings, RunInputs, inspect_inputs
from diffnext.engine.snapshot import RunFolder
from diffnext.engine.train_engine import Trainer
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.models.vision_transformer import VisionTransformer
from diffnext.utils.accelerate_utils import precision_to_dtype

logger = logging.getLogger(__name__)

GIB = 2**30
MB = 1e6
SHOWN_PROCESSES = (1, 8, 128)
TIMED_STEPS = 3
# Of a GPU's memory; the rest is for the CUDA context, libraries and fragmentation.
USABLE_SHARE = 0.92
# Latent frames assumed where no dataset tells: 33 frames of video, 4 to a latent after the first.
DEFAULT_VIDEO_FRAMES = 9
PARTS = {
    "video encoder": ("video_encoder",),
    "image encoder": ("image_encoder",),
    "decoder MLP": ("image_decoder",),
}
ENGINE_NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2"}
DISTRIBUTED: dict[DistributedType, Engine] = {
    DistributedType.DEEPSPEED: "zero2",
    DistributedType.FSDP: "fsdp2",
}
COLUMNS = ["engine", "processes", "weights", "gradients", "optimizer", "engine buffers"]
COLUMNS += ["activations", "frozen", "EMA", "peak"]
# Parameters of the frozen components of the released models, assumed where no weights are at hand.
FROZEN = {"vae": ("AutoencoderKL", 83_653_863), "text_encoder": ("Phi-2", 2_779_683_840)}


def dry_run(
    config: TrainConfig,
    accelerator: Accelerator | None = None,
    report: Callable[[str], Any] = logger.info,
) -> bool:
    """Report on a run without training.

    Args:
        config: Training configuration.
        accelerator: The launched processes; default: one process, on the best device here.
        report: Called on the main process with each paragraph.

    Returns:
        Whether the run can start and fits, the same on every process.
    """
    accelerator = Accelerator() if accelerator is None else accelerator
    agreement = Agreement(accelerator)
    inputs, problems = agreement.decide(lambda: _inspect(config, accelerator, report))
    measured = "not measured: the run cannot start with what is here"
    if inputs is not None:
        failure = None
        try:
            measured = _time_steps(config, accelerator, inputs)
        except (RuntimeError, ValueError, OSError) as error:
            measured = "not measured: a step failed, see below"
            failure = f"a real step failed: {error}"
        problems += agreement.collect(failure)
    if accelerator.is_main_process:
        report(f"Step time: {measured}")
        lines = ["This run cannot start or finish, because", *(f"  - {p}" for p in problems)]
        report("\n".join(lines) if problems else "Ready: nothing found that would stop this run")
    return not problems


def _inspect(
    config: TrainConfig, accelerator: Accelerator, report: Callable[[str], Any]
) -> tuple[RunInputs | None, list[str]]:
    """Report what needs no training.

    Returns:
        What the run reads, None if it cannot start; and everything that is wrong.
    """
    findings = inspect_inputs(config, accelerator.num_processes)
    problems = list(findings.problems)
    inputs = findings.inputs()
    run = RunFolder(Path(config.experiment.output_dir), config.model.name)
    start = "unclear"
    try:
        resume = find_resume_point(run, config.experiment.resume_from_checkpoint)
        start = "afresh" if resume is None else f"from {resume.checkpoint}"
        if resume is not None and inputs is not None:
            differing = find_mismatches(config, inputs, resume)
            problems += [text for text, can_continue in differing if not can_continue]
    except ConfigError as error:
        problems += error.problems
    device = accelerator.device
    dtype = str(precision_to_dtype(config.training.mixed_precision)).removeprefix("torch.")
    report(
        f"Dry run of {config.experiment.name or config.config}: {accelerator.num_processes} x "
        f"{device.type} ({memory.device_bytes(device) / GIB:.1f} GiB), "
        f"{ENGINE_NAMES[DISTRIBUTED.get(accelerator.distributed_type, 'ddp')]}, {dtype}"
    )
    report(f"Starts {start}")
    try:
        paragraphs = _Paragraphs(config, accelerator, findings)
    except (LookupError, TypeError, ValueError) as error:  # sizes that no model can have
        overlay = "pipeline.paths.module_config.transformer is not enough"
        return None, problems or [f"{overlay} without the base folder: {error} is missing"]
    for paragraph in paragraphs.write(problems):
        report(paragraph)
    return None if problems else inputs, problems


def _time_steps(config: TrainConfig, accelerator: Accelerator, inputs: RunInputs) -> str:
    """Time some optimizer steps from the base weights, after one that warms up."""
    options = config.training
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    seconds = []
    with contextlib.closing(Trainer(config, accelerator, logger, inputs=inputs)) as trainer:
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            trainer.run_step(options.gradient_accumulation_steps)
            synchronize_device(accelerator.device)
            seconds.append(time.perf_counter() - start)
    del seconds[0]
    samples = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    median = statistics.median(seconds)
    days = median * options.max_train_steps / 86400
    text = (
        f"{median:.3f} s (median of {len(seconds)}: {min(seconds):.3f} to {max(seconds):.3f}), "
        f"{samples / median:.1f} samples/s; {options.max_train_steps} steps take {days:.2f} days"
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(accelerator.device)
        text += f"\nMeasured peak memory: {peak / GIB:.2f} GiB"
    return text


# The model and its memory


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The model that a run trains, and its frozen components.

    Attributes:
        config: Training configuration.
        transformer: The model.
        frozen_parameters: Parameters of each frozen component.
        notes: What had to be assumed.
    """

    config: TrainConfig
    transformer: TransformerFacts
    frozen_parameters: Mapping[str, int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, config: TrainConfig, findings: Findings) -> ModelPlan:
        """Find it as far as the base folder is on this machine."""
        base = findings.base
        notes = []
        if base is None or base.find("transformer") is None:
            name = config.pipeline.paths.pretrained_path
            notes.append(f"{name} is not complete on this machine")
            notes.append("sizes are those of pipeline.paths.module_config")
        frozen = {}
        given = config.pipeline.paths.module_dict.given()
        reads_text = bool(findings.transformer.sizes.get("text_token_dim"))
        for component, (model, count) in FROZEN.items():
            is_left_out = base is not None and component not in base.components
            is_needless = component == "text_encoder" and not reads_text
            if is_left_out or is_needless or not given.get(component, True):
                continue
            folder = None if base is None else base.find(component)
            shapes = {} if folder is None else read_shapes(folder)
            frozen[component] = sum(math.prod(shape) for shape in shapes.values()) or count
            if not shapes:
                notes.append(f"{component}: no weights, assumed {model}, {count / 1e6:.0f} M")
        return cls(
            config=config,
            transformer=findings.transformer,
            frozen_parameters=frozen,
            notes=tuple(notes),
        )

    def make(self) -> NOVATransformer3DModel:
        """Build the model on the meta device, ready for training."""
        options = self.config.model
        pipeline = import_target(self.config.pipeline.target)
        model = memory.make_meta_model(
            self.transformer.arguments,
            frozen_modules=getattr(pipeline, "frozen_modules", ()),
            gradient_checkpointing=options.gradient_checkpointing,
            loss_repeat=options.loss_repeat,
        )
        if options.lora is not None:
            from diffnext.engine.lora import add_lora

            with torch.device("meta"):
                add_lora(model, options.lora)
        return model

    def batch_shape(self, moments: tuple[int, ...] = ()) -> BatchShape:
        """The shapes of a micro-batch.

        Args:
            moments: Shape of the dataset's; without them, or if they do not fit the model, it is
                the model's, and a video has the usual number of frames.
        """
        is_video = self.transformer.sizes["video_base_size"][0] > 1
        frames = DEFAULT_VIDEO_FRAMES if is_video else 1
        latent_size = self.transformer.latent_size
        if latent_size is None:
            raise LookupError("image_size or image_stride")
        if self.transformer.fits(moments):
            frames = moments[1] if len(moments) == 4 else 1
            latent_size = (moments[-2], moments[-1])
        size = self.config.training.batch_size
        return BatchShape(size=size, frames=frames, latent_size=latent_size)


def _ema_bytes(config: TrainConfig, counts: memory.ParameterCounts, device_type: str) -> int:
    """Memory of the averaged weights on the devices of a type."""
    if config.ema is None or (config.ema.params.device == "cpu" and device_type != "cpu"):
        return 0
    return FLOAT32 * counts.total + counts.buffers


def memory_table(
    plan: ModelPlan,
    batch: BatchShape,
    device_type: str,
    processes: Sequence[int],
    engines: Sequence[Engine] = ENGINES,
) -> dict[tuple[Engine, int], MemoryEstimate]:
    """Estimate the memory of engines on several numbers of processes.

    Args:
        plan: Model and frozen components.
        batch: Shapes of the micro-batch.
        device_type: "cuda" or "cpu".
        processes: Numbers of processes.
        engines: Engines.

    Returns:
        Bytes on the main process's device, by engine and number of processes.
    """
    options = plan.config.training
    dtype = precision_to_dtype(options.mixed_precision)
    states = optimizer_states(plan.config)
    estimates = {}
    for engine in engines:
        model = plan.make()
        counts = memory.ParameterCounts.of(model)
        step = memory.simulate_step(
            model, batch, engine=engine, dtype=dtype, device_type=device_type
        )
        for number in processes:
            estimates[engine, number] = memory.estimate_memory(
                engine,
                number,
                counts=counts,
                step=step,
                dtype=dtype,
                optimizer_states=states,
                frozen_bytes=dtype.itemsize * sum(plan.frozen_parameters.values()),
                ema_bytes=_ema_bytes(plan.config, counts, device_type),
                is_accumulating=options.gradient_accumulation_steps > 1,
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
    header = COLUMNS + (["fits"] if usable is not None else [])
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (engine, number), estimate in sorted(estimates.items(), key=lambda item: item[0][1]):
        parts = (f"{part / GIB:.2f}" for part in astuple(estimate))
        row = [ENGINE_NAMES[engine], str(number), *parts]
        if usable is not None:
            row.append("yes" if estimate.peak <= usable else "NO")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def optimizer_states(config: TrainConfig) -> float:
    """Numbers that the configured optimizer keeps for each parameter, found by one step."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = config_to_object(config.optimizer, params=[parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim) / parameter.numel()


def checkpoints_kept(config: TrainConfig) -> int:
    """Most checkpoints on disk at a time, the one being written included."""
    options = config.checkpoint
    max_steps = config.training.max_train_steps
    written = math.ceil(max_steps / config.experiment.save_every)
    if options.keep_last is None:
        return written
    pinned = max_steps // options.keep_every if options.keep_every else 0
    return min(written, options.keep_last + 1 + pinned)


# The report


class _Paragraphs:
    """The size of a model, its data and a step, in words.

    Raises:
        LookupError: If a size is missing.
        TypeError: If a size has another type.
        ValueError: If a size is out of range.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, findings: Findings) -> None:
        self.config = config
        self.accelerator = accelerator
        self.datasets = findings.datasets
        self.plan = ModelPlan.of(config, findings)
        self.batches = [self.plan.batch_shape(facts.shape) for facts in self.datasets]
        self.batches = self.batches or [self.plan.batch_shape()]
        weights = [facts.weight for facts in self.datasets] or [1]
        self.shares = [weight / sum(weights) for weight in weights]  # of the batches
        options = config.training
        self.samples_per_step = options.batch_size * options.gradient_accumulation_steps
        self.model = self.plan.make()
        self.counts = memory.ParameterCounts.of(self.model)

    def write(self, problems: list[str]) -> Iterator[str]:
        """Yield the paragraphs; add what does not fit to ``problems``."""
        yield self.parameters()
        yield "\n".join(self.data())
        yield "\n".join(self.step())
        yield self.memory(problems)
        yield self.disk(problems)

    def parameters(self) -> str:
        """Parameters of the model's parts and of the frozen components."""
        named = dict(self.model.named_children())
        rows = {title: [named.pop(name) for name in names] for title, names in PARTS.items()}
        rows |= {"rest": list(named.values()), "in all": [self.model]}
        lines = ["Parameters (millions)        all  trained"]
        for title, modules in rows.items():
            parameters = [p for module in modules for p in module.parameters()]
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            total = sum(p.numel() for p in parameters)
            lines.append(f"  {title:<22}{total / 1e6:>9.2f}{trained / 1e6:>9.2f}")
        for name, count in self.plan.frozen_parameters.items():
            lines.append(f"  {name + ', frozen':<22}{count / 1e6:>9.2f}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.plan.notes)])

    def data(self) -> Iterator[str]:
        """The datasets, and how they are shared out."""
        if not self.datasets or not all(facts.shape for facts in self.datasets):
            yield "Data: not readable"
            return
        read = 0.0
        for facts, share in zip(self.datasets, self.shares, strict=True):
            yield from self.dataset(facts, share)
            read += self.samples_per_step * share * facts.record_bytes
        yield f"  each process reads {read / MB:.2f} MB per step"

    def dataset(self, dataset: DatasetFacts, share: float) -> Iterator[str]:
        """One of the datasets, which a share of the batches comes from."""
        of = f", {share:.2%} of the batches from {dataset.folder}" if len(self.shares) > 1 else ""
        yield (
            f"Data{of}: {dataset.num_examples} examples; moments {dataset.shape} {dataset.dtype}; "
            f"{dataset.prompt}; {dataset.record_bytes / MB:.2f} MB each"
        )
        if dataset.num_held_out:
            yield f"  {dataset.num_held_out} of them, the last, are held out for validation"
        number = self.accelerator.num_processes
        if share < 1:
            number = filled_shards(dataset.num_train, number)
        try:
            size = ExampleOrder(num_examples=dataset.num_train, num_shards=number).shard_size
        except ValueError:  # which is among the problems
            return
        last = dataset.num_train - size * (number - 1)
        steps = self.config.training.max_train_steps
        per_step = self.samples_per_step * share
        yield f"  {number} shards of {size} examples{f', the last of {last}' * (last != size)}"
        yield (
            f"  {math.ceil(size / per_step)} steps per epoch; {steps} steps are "
            f"{steps * per_step / size:.2f} epochs"
        )

    def step(self) -> Iterator[str]:
        """Tokens and samples."""
        for number in range(len(self.batches)):
            yield from self.sample(number)
        processes = self.accelerator.num_processes
        samples = self.samples_per_step * processes
        image_tokens = [self.tokens(batch, self.model.image_encoder) for batch in self.batches]
        mean = sum(n * share for n, share in zip(image_tokens, self.shares, strict=True))
        options = self.config.training
        yield (
            f"Optimizer step: {samples} samples ({options.batch_size} x "
            f"{options.gradient_accumulation_steps} micro-batches x {processes} processes), "
            f"{samples * mean:.0f} image tokens"
        )

    def sample(self, number: int) -> Iterator[str]:
        """The size of a sample of a dataset."""
        model, batch = self.model, self.batches[number]
        is_assumed = not self.datasets or not self.plan.transformer.fits(
            self.datasets[number].shape
        )
        of = f" of {self.datasets[number].folder}" if len(self.batches) > 1 else ""
        assumed = ", assumed, as no fitting records can be read" if is_assumed else ""
        yield f"A sample{of}: {_size(batch)} latents{assumed}"
        condition = model.text_embed.num_tokens if model.text_embed is not None else 1
        image = self.tokens(batch, model.image_encoder)
        yield (
            f"Tokens per sample: {self.tokens(batch, model.video_encoder)} in the video encoder "
            f"and {image} in the image encoder, {condition} of condition; "
            f"{image * model.loss_repeat} in the loss ({model.loss_repeat} noise levels)"
        )

    @staticmethod
    def tokens(batch: BatchShape, encoder: VisionTransformer) -> int:
        """Tokens of a sample in an encoder."""
        patch = encoder.patch_embed.patch_size
        rows, columns = batch.latent_size
        return batch.frames * (rows // patch) * (columns // patch)

    def memory(self, problems: list[str]) -> str:
        """Memory of this launch and of others."""
        engine = DISTRIBUTED.get(self.accelerator.distributed_type, "ddp")
        number = self.accelerator.num_processes
        device = self.accelerator.device.type
        usable = int(USABLE_SHARE * memory.device_bytes(self.accelerator.device))
        if device == "cpu":  # the processes of this machine share its memory
            usable //= int(os.environ.get("LOCAL_WORLD_SIZE", number))
        largest = max(self.batches, key=lambda batch: self.tokens(batch, self.model.image_encoder))
        own = memory_table(self.plan, largest, device, [number], [engine])[engine, number]
        if own.peak > usable:
            problems.append(
                f"does not fit: {own.peak / GIB:.1f} GiB are needed on each {device}, "
                f"{usable / GIB:.1f} GiB can be used (training.batch_size, "
                "model.gradient_checkpointing, another engine)"
            )
        estimates = memory_table(self.plan, largest, "cuda", sorted({*SHOWN_PROCESSES, number}))
        of = f" of {_size(largest)} latents" if len(self.batches) > 1 else ""
        lines = [
            f"Memory: {own.peak / GIB:.2f} GiB on each {device} of this launch, "
            f"{usable / GIB:.1f} GiB can be used",
            f"Memory of a GPU in GiB, batch {largest.size}{of}, checkpointing level "
            f"{self.config.model.gradient_checkpointing}:",
            format_memory(estimates, usable if device == "cuda" else None),
        ]
        if self.config.ema is not None and self.config.ema.params.device == "cpu":
            average = _ema_bytes(self.config, self.counts, "cpu")
            lines.append(f"  and {average / GIB:.2f} GiB of main memory for the EMA of process 0")
        return "\n".join(lines)

    def disk(self, problems: list[str]) -> str:
        """Size of the checkpoints against the free disk."""
        config, counts = self.config, self.counts
        saved = counts.total if config.model.lora is None else counts.trainable
        moments = int(FLOAT32 * optimizer_states(config) * counts.trainable)
        copies = FLOAT32 if config.ema is None else 2 * FLOAT32  # masters and average
        copies += precision_to_dtype(config.training.mixed_precision).itemsize
        each = copies * saved + moments
        number = checkpoints_kept(config)
        folder = Path(config.experiment.output_dir).absolute()
        existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        free = shutil.disk_usage(existing).free
        if each * number > free:
            problems.append(
                f"does not fit: {number} checkpoints of {each / GIB:.2f} GiB each, "
                f"{free / GIB:.1f} GiB free at {existing} (checkpoint.keep_last, "
                "experiment.save_every)"
            )
        return (
            f"Disk: {each / GIB:.2f} GiB per checkpoint, at most {number} at a time are "
            f"{each * number / GIB:.1f} GiB; {free / GIB:.1f} GiB free at {existing}"
        )


def _size(batch: BatchShape) -> str:
    return " x ".join(map(str, (batch.frames, *batch.latent_size)))
