"""Every key of a training configuration: type, default and meaning, in one place.

The dataclasses below serve the checks of files and command lines, the defaults of keys left out,
``scripts/train.py --help``, and people. A field of type ``dict`` is open: what may stand under it
is decided by the class named in the ``target`` beside it, or by the component it configures.
"""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

USAGE = """usage: {program} config=FILE.yaml [key.path=value ...] [+new.key=value ...] [~key ...]

  key=value   overrides the file; values are written as in YAML
  +key=value  adds a key that is not in the list below
  ~key        deletes a key, or a whole section, of the file
"""


def key(meaning: str, default: Any = MISSING) -> Any:
    """Declare one configuration key.

    Args:
        meaning: One sentence for ``--help``.
        default: Value used when the key is absent; without one the key is required.
    """
    metadata = {"meaning": meaning}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases tracking; leave the section out to switch it off."""

    run_id: str | None = key("Run to continue; null makes a new one, kept across resumes.", None)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Names, output folder and intervals of a run."""

    output_dir: str = key("Folder for checkpoints, logs and the saved configuration.")
    project: str | None = key("Project name shown by the tracker.", "diffnext")
    name: str | None = key("Run name shown by the tracker.", None)
    log_every: int = key("Steps between two log entries.", 20)
    save_every: int = key("Steps between two checkpoints.", 5000)
    resume_from_checkpoint: str | None = key(
        'Where to continue: "latest", the path of a checkpoint, or "" to start afresh.', "latest"
    )
    resume_iter: int = key("Written by a run (step it resumed at); ignored as input.", 0)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of a video model's losses in their sum; the log shows them unweighted."""

    t2i: float = key("Weight of loss_t2i, the first frame.", 1.0)
    i2v: float = key("Weight of loss_i2i, the later frames.", 1.0)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Train low-rank adapters and nothing else; leave the section out to train the model."""

    rank: int = key("Rank of the adapters.", 16)
    alpha: float | None = key("Adapters are scaled by alpha / rank; null: alpha is the rank.", None)
    dropout: float = key("Dropout in front of the adapters.", 0.0)
    target_modules: list[str] | None = key(
        "Names, or ends of names, of the linear layers to adapt; null: those of attention.", None
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The trained component."""

    name: str = key("Folder name of the trained component inside a checkpoint.", "transformer")
    gradient_checkpointing: int = key(
        "0 off; 1 video encoder, 2 and image encoder, 3 and image decoder recompute activations.",
        0,
    )
    loss_repeat: int = key("Noise levels drawn per token in one step.", 4)
    mask_ratios: list[float] | None = key(
        "Least and largest share of hidden tokens, and how wide the normal around the largest is; "
        "null: 0.7, 1, 0.25.",
        None,
    )
    loss_weights: LossWeights = key("Weights of the losses of videos.", {})
    lora: LoraOptions | None = key("Low-rank adapters.", None)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Laid over the base folder's transformer/config.json; keys left out keep its values."""

    image_dim: int | None = key("Latent channels.", None)
    image_size: list[int] | int | None = key("Pixel height and width.", None)
    image_stride: int | None = key("Pixels per latent position of the autoencoder.", None)
    text_token_dim: int | None = key("Width of the text encoder's states.", None)
    text_token_len: int | None = key("Text tokens per prompt.", None)
    rotary_pos_embed: bool | None = key("Rotary instead of absolute positions.", None)
    video_base_size: list[int] | None = key(
        "Frames, token rows and columns of the video encoder.", None
    )
    image_base_size: list[int] | None = key("Token rows and columns of the image encoder.", None)
    video_mixer_rank: int | None = key("Rank of the video mixer; null for none.", None)
    arch: list[str] | None = key("Names of video encoder, image encoder and image decoder.", None)


@dataclass(frozen=True, kw_only=True)
class ModuleConfigs:
    """Overlays of component configurations, by component."""

    transformer: TransformerConfig = key("Overlay of transformer/config.json.", {})
    scheduler: dict = key("Overlay of scheduler/scheduler_config.json.", {})
    vae: dict = key("Overlay of vae/config.json.", {})
    text_encoder: dict = key("Overlay of text_encoder/config.json.", {})


@dataclass(frozen=True, kw_only=True)
class ModuleDict:
    """Own paths of components; an empty value leaves the component out."""

    transformer: str | None = key("Folder of the transformer.", None)
    scheduler: str | None = key("Folder of the scheduler.", None)
    text_encoder: str | None = key("Folder of the text encoder.", None)
    tokenizer: str | None = key("Folder of the tokenizer.", None)
    vae: str | None = key("Folder of the autoencoder.", None)
    model_index: str | None = key("File that lists the components.", None)


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where the pipeline's components come from."""

    pretrained_path: str = key("Base folder in the release layout, or a Hub name.")
    module_dict: ModuleDict = key("Component -> its own path.", {})
    module_config: ModuleConfigs = key("Component -> values laid over its config.json.", {})
    target_path: str | None = key("Assemble the folder here, not in a temporary one.", None)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The training pipeline."""

    target: str = key("Dotted path of the training pipeline class.")
    paths: PathsConfig = key("Arguments of get_pipeline_path.", {})


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer."""

    target: str = key("Dotted path of the optimizer class.", "torch.optim.AdamW")
    params: dict = key("Its keyword arguments, such as lr, betas, weight_decay, fused.", {})


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The learning rate over time."""

    target: str = key(
        "Dotted path of the schedule: ConstantLR, CosineLR or MultiStepLR.",
        "diffnext.engine.lr_scheduler.ConstantLR",
    )
    params: dict = key("Its keyword arguments, such as lr_max, lr_min, warmup_steps.", {})


@dataclass(frozen=True, kw_only=True)
class DataLoaderParams:
    """Arguments of the loader."""

    dataset: str = key("Folder of records.")
    batch_size: int = key("Examples per batch.", 1)
    seed: int = key("Seed of order and caption choice; the shard number is added.", 1337)
    shuffle: bool = key("Shuffle the examples.", True)
    num_workers: int = key("Reading processes; 0 reads in the training process.", 0)
    queue_depth: int = key("Batches each reading process prepares ahead.", 2)
    shard_id: int | None = key("Shard of this process; null: its rank.", None)
    num_shards: int | None = key("Number of shards; null: number of processes.", None)
    initial_fill: int = key("Shuffling window, in examples.", 1024)
    stick_to_partition: bool = key("Read the same shard in every pass.", True)
    contiguous: bool = key("Stack the latents of a batch into one array.", True)
    max_examples: int | None = key("Written by a run (examples in the dataset).", None)
    prefetch_count: int = key("Accepted and without effect.", 50)
    start_method: str | None = key("How reading processes start: fork, spawn, forkserver.", None)
    timeout: float = key("Seconds to wait for a reading process; 0: for ever.", 120.0)


@dataclass(frozen=True, kw_only=True)
class DataLoaderConfig:
    """The training data."""

    target: str = key(
        "Dotted path of the loader class.", "diffnext.data.flex_loaders.FeatureDataLoader"
    )
    params: DataLoaderParams = key("Its keyword arguments.", {})


@dataclass(frozen=True, kw_only=True)
class EMAParams:
    """Averaging of the weights."""

    decay: float = key("Share of the old average kept at an update.", 0.99)
    update_every: int = key("Steps between two updates.", 100)
    device: Literal["cpu", "gpu"] = key('"cpu" keeps the average in main memory.', "gpu")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights; leave the section out to switch it off."""

    params: EMAParams = key("Arguments of ModelEMA.", {})


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written."""

    format: Literal["safetensors", "bin"] = key("File format of the weights.", "safetensors")
    keep_last: int | None = key("Delete all but the newest so many checkpoints; null: none.", None)
    keep_every: int | None = key("Never delete checkpoints of multiples of this step.", None)
    async_save: bool = key("Write while training goes on; costs a copy in main memory.", False)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Samples and held-out loss while training."""

    every: int | None = key("Steps between two validations; null for none.", None)
    prompts: list[str] | list[int] | None = key(
        "Prompts (or classes) to draw; null: some of the dataset.", None
    )
    seeds: list[int] = key("Each prompt is drawn once with each of these seeds.", [0])
    num_inference_steps: int = key("Steps over which the tokens of a frame are drawn.", 16)
    num_diffusion_steps: int = key("Denoising steps of a token.", 10)
    guidance_scale: float = key("Strength of classifier-free guidance.", 5.0)
    max_latent_length: int | None = key(
        "Latent frames to draw; null: one, or for video models as many as trained on.", None
    )
    holdout: float | str | None = key(
        "Share of the dataset (its end) kept from training, or a folder of records, for the "
        "held-out loss; null for none.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    max_train_steps: int = key("Optimizer steps of the whole run.")
    batch_size: int = key("Examples per process and micro-batch.", 1)
    gradient_accumulation_steps: int = key("Micro-batches per optimizer step.", 1)
    seed: int = key("Seed of process 0; process r uses seed + r.", 1337)
    mixed_precision: str | bool | None = key("no (or fp32, false), fp16 or bf16.", "bf16")
    max_grad_norm: float | None = key("Clip the gradient norm to this; null for no clipping.", None)
    on_nonfinite: Literal["stop", "skip"] = key(
        "What to do when a loss or gradient is not finite: end the run, or leave the step out.",
        "stop",
    )
    compile: bool = key("Compile the blocks of the model; the first steps take minutes.", False)
    time_limit: str | None = key(
        'Save and stop after this time, such as "23h30m"; null for no limit.', None
    )
    dry_run: bool = key("Check and estimate everything, train nothing.", False)
    progress_bar: bool = key("Show a live progress bar on process 0.", True)
    gpu_id: int | None = key("Written by a run (device index); ignored as input.", None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training configuration."""

    config: str = key("YAML file that the other arguments override.")
    wandb: WandbConfig | None = key("Weights & Biases.", None)
    tracking: list[str] | None = key(
        "Trackers, wandb or tensorboard; null: wandb if there is a wandb section.", None
    )
    experiment: ExperimentConfig = key("Run.", {})
    model: ModelConfig = key("Model.", {})
    pipeline: PipelineConfig = key("Pipeline.", {})
    optimizer: OptimizerConfig = key("Optimizer.", {})
    lr_scheduler: LRSchedulerConfig = key("Learning rate.", {})
    train_dataloader: DataLoaderConfig = key("Data.", {})
    ema: EMAConfig | None = key("Weight averaging.", None)
    checkpoint: CheckpointConfig = key("Checkpoints.", {})
    validation: ValidationConfig = key("Validation.", {})
    training: TrainingConfig = key("Loop.", {})


@dataclass(frozen=True)
class SchemaKey:
    """One dotted key of a schema."""

    path: str
    type_name: str
    hint: Any
    default: Any
    meaning: str
    section: type | None
    open: bool

    @property
    def required(self) -> bool:
        """Whether a configuration without this key is incomplete."""
        return self.default is MISSING


def iterate_schema(schema: type, prefix: str = "") -> Iterator[SchemaKey]:
    """Walk all keys of a schema, sections before their keys.

    Args:
        schema: A dataclass as above.
        prefix: Dotted path of the section being walked.
    """
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        section = _section_class(hints[item.name])
        path = prefix + item.name
        yield SchemaKey(
            path=path,
            type_name=str(item.type),
            hint=hints[item.name],
            default=_default_of(item),
            meaning=item.metadata["meaning"],
            section=section,
            open=hints[item.name] is dict,
        )
        if section is not None:
            yield from iterate_schema(section, path + ".")


def describe_schema(schema: type) -> str:
    """Render the keys of a schema as the body of a help text.

    Args:
        schema: A dataclass as above.
    """
    lines = []
    for item in iterate_schema(schema):
        if item.section is not None:
            lines += ["", f"{item.path}: {_summary(item.section)}"]
            continue
        default = "required" if item.required else f"default {_yaml_literal(item.default)}"
        lines.append(f"  {item.path}  ({item.type_name}, {default})")
        lines += textwrap.wrap(item.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _section_class(hint: Any) -> type | None:
    """The dataclass behind ``Section`` or ``Section | None``; None for a plain key."""
    for candidate in (hint, *typing.get_args(hint)):
        if is_dataclass(candidate):
            return candidate
    return None


def _default_of(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _summary(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "").splitlines()[0]


def _yaml_literal(value: Any) -> str:
    """Write a default as one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if value == "" else str(value)
