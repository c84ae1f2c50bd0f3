"""Every key of a training configuration: type, limits, default and meaning, in one place.

:mod:`diffnext.config.load` makes a file and a command line a tree of these dataclasses; everything
after reads its attributes. They also serve ``scripts/train.py --help`` and docs/configuration.md.
A field of type ``dict`` is open: the class named in the ``target`` beside it, or the component it
configures, decides which keys it takes.
"""

from __future__ import annotations

import inspect
import os
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from diffnext.config.targets import import_target
from diffnext.data.dataset_folders import parse_folders
from diffnext.utils.profiler import parse_duration

USAGE = """usage: {program} config=FILE.yaml [key.path=value ...] [+new.key=value ...] [~key ...]

  key=value   overrides the file; values are written as in YAML
  +key=value  adds a key that is not in the list below
  ~key        deletes a key, or a whole section, of the file
"""


def key(meaning: str, default: Any = MISSING) -> Any:
    """Declare one configuration key.

    Args:
        meaning: One sentence for ``--help``.
        default: Value used when the key is absent; without one the key is required. A dataclass
            means a section of its defaults.
    """
    metadata = {"meaning": meaning}
    if isinstance(default, type | dict):
        factory = default if isinstance(default, type) else default.copy
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


# Limits


def precision_name(value: Any) -> Any:
    """Name of a precision: YAML reads an unquoted ``no`` as false."""
    name = "no" if value is None else str(value).lower()
    return "no" if name in ("fp32", "false") else name


def _importable(target: str) -> str:
    import_target(target)
    return target


def _duration(text: str) -> str:
    if not parse_duration(text):
        raise ValueError("must be longer than 0")
    return text


def _mask_ratios(value: tuple[float, float, float]) -> tuple[float, float, float]:
    low, high, width = value
    if not (0 <= low < high <= 1 and width > 0):
        limits = "0 <= least < largest <= 1 and width > 0"
        raise ValueError(f"must be least share, largest share and width, with {limits}")
    return value


def _dataset(value: Any) -> Any:
    parse_folders(value)
    return value


def _model_name(value: str) -> str:
    others = ("scheduler", "state", "text_encoder", "tokenizer", "vae")
    if value in others:
        raise ValueError(f"must not be another part of a checkpoint ({', '.join(others)})")
    return value


def not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Require something in a list."""
    if not value:
        raise ValueError("must not be empty")
    return value


# The text in each is the type as --help shows it.
Count = Annotated[int, Field(ge=1), "int >= 1"]
Natural = Annotated[int, Field(ge=0), "int >= 0"]
Level = Annotated[int, Field(ge=0, le=3), "0, 1, 2 or 3"]
Seed = Annotated[int, Field(ge=0, lt=2**32), "int >= 0"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), "float > 0"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), "float >= 0"]
Share = Annotated[float, Field(ge=0, le=1), "float, 0 to 1"]
Dropout = Annotated[float, Field(ge=0, lt=1), "float, 0 to below 1"]
Holdout = Annotated[float, Field(gt=0, le=0.5), "float, to 0.5"]
MaskRatios = Annotated[tuple[float, float, float], AfterValidator(_mask_ratios), "list of 3 floats"]
Size = Annotated[tuple[Count, Count], "list of 2 ints"]
Volume = Annotated[tuple[Count, Count, Count], "list of 3 ints"]
Texts = Annotated[tuple[str, ...], AfterValidator(not_empty), "list of str"]
Integers = Annotated[tuple[int, ...], AfterValidator(not_empty), "list of int"]
Trackers = Annotated[tuple[Literal["wandb", "tensorboard"], ...], "list of wandb, tensorboard"]
Arch = Annotated[tuple[str, str, str], "list of 3 str"]
Precision = Annotated[
    Literal["no", "fp16", "bf16"], BeforeValidator(precision_name), "no, fp16 or bf16"
]
Folder = Annotated[str, AfterValidator(os.path.expanduser), "str"]
ModelName = Annotated[str, Field(pattern=r"^\w[\w.-]*$"), AfterValidator(_model_name), "plain name"]
Dataset = Annotated[
    str | list[Any], AfterValidator(_dataset), "str | list of str or {folder: str, weight: float}"
]
StartMethod = Literal["fork", "spawn", "forkserver"]
Target = Annotated[str, AfterValidator(_importable), "dotted path"]
Duration = Annotated[str, AfterValidator(_duration), "duration"]


class Section:
    """What all sections share: unknown keys and values of another type are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


class _Keep:
    """The value of a key that a configuration leaves to the base folder."""

    def __repr__(self) -> str:
        return "the base folder's"

    def __reduce__(self) -> str:
        return "KEEP"  # copies are the same object


KEEP = _Keep()


class Overlay(Section):
    """A section laid over the base folder; null is a value of its own."""

    def given(self) -> dict[str, Any]:
        """The keys that the configuration sets, as JSON has them."""
        values = {name: value for name, value in vars(self).items() if value is not KEEP}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


# Keys


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Section):
    """Weights & Biases tracking; leave the section out to switch it off."""

    run_id: str | None = key("Run to continue; null makes a new one, kept across resumes.", None)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Section):
    """Names, output folder and intervals of a run."""

    output_dir: Folder = key("Folder for checkpoints, logs and the saved configuration.")
    project: str | None = key("Project name shown by the tracker.", "diffnext")
    name: str | None = key("Run name shown by the tracker.", None)
    log_every: Count = key("Steps between two log entries.", 20)
    save_every: Count = key("Steps between two checkpoints.", 5000)
    resume_from_checkpoint: str | None = key(
        'Where to continue: "latest", the path of a checkpoint, or "" to start afresh.', "latest"
    )
    resume_iter: int = key("Written by a run (step it resumed at); ignored as input.", 0)


@dataclass(frozen=True, kw_only=True)
class LossWeights(Section):
    """Weights of a video model's losses in their sum; the log shows them unweighted."""

    t2i: NotNegative = key("Weight of loss_t2i, the first frame.", 1.0)
    i2v: NotNegative = key("Weight of loss_i2i, the later frames.", 1.0)

    def __post_init__(self) -> None:
        if not (self.t2i or self.i2v):
            raise ValueError("must not all be 0: nothing would be trained")

    def by_output(self) -> dict[str, float]:
        """The weights by the names of a model's outputs."""
        return {"loss_t2i": self.t2i, "loss_i2i": self.i2v}


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Section):
    """Train only low-rank adapters; leave the section out to train the whole model."""

    rank: Count = key("Rank of the adapters.", 16)
    alpha: Positive | None = key("Adapters are scaled by alpha / rank; null: the rank.", None)
    dropout: Dropout = key("Dropout in front of the adapters.", 0.0)
    target_modules: Texts | None = key(
        "Names, or ends of names, of the linear layers to adapt; null: attention's.", None
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The trained component."""

    name: ModelName = key(
        "Folder name of the trained component inside a checkpoint; with any other name than "
        "`transformer`, no pipeline can load the checkpoint.",
        "transformer",
    )
    gradient_checkpointing: Level = key(
        "0: off; recompute in 1: video encoder, 2: also image encoder, 3: also diffusion MLP.", 0
    )
    loss_repeat: Count = key("Noise levels drawn per token in one step.", 4)
    mask_ratios: MaskRatios | None = key(
        "Least and largest share of hidden tokens, and the width of their normal distribution; "
        "null: 0.7, 1, 0.25.",
        None,
    )
    context_noise: Share = key(
        "Maximum noise added to context frames in training; reduces drift.", 0.0
    )
    loss_weights: LossWeights = key("Weights of the losses of videos.", LossWeights)
    lora: LoraOptions | None = key("Low-rank adapters.", None)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Overlay):
    """Laid over the base folder's transformer/config.json; keys left out keep its values."""

    image_dim: Count | None = key("Latent channels.", KEEP)
    image_size: Size | Count | None = key("Pixel height and width.", KEEP)
    image_stride: Count | None = key("Pixels per latent position of the autoencoder.", KEEP)
    text_token_dim: Count | None = key("Width of the text embeddings.", KEEP)
    text_token_len: Count | None = key("Text tokens per prompt.", KEEP)
    rotary_pos_embed: bool | None = key("Rotary instead of absolute positions.", KEEP)
    video_base_size: Volume | None = key("Frames, rows and columns of the video encoder.", KEEP)
    image_base_size: Size | None = key("Rows and columns of the image encoder.", KEEP)
    video_mixer_rank: int | None = key("Rank of the video mixer; null for none.", KEEP)
    arch: Arch | None = key("Names of video encoder, image encoder and diffusion MLP.", KEEP)


@dataclass(frozen=True, kw_only=True)
class ModuleConfigs(Section):
    """Overlays of component configurations, by component."""

    transformer: TransformerConfig = key("Overlay of transformer/config.json.", TransformerConfig)
    scheduler: dict = key("Overlay of scheduler/scheduler_config.json.", {})
    vae: dict = key("Overlay of vae/config.json.", {})
    text_encoder: dict = key("Overlay of text_encoder/config.json.", {})


@dataclass(frozen=True, kw_only=True)
class ModuleDict(Overlay):
    """Custom paths for components; an empty value leaves the component out."""

    transformer: str | None = key("Folder of the transformer.", KEEP)
    scheduler: str | None = key("Folder of the scheduler.", KEEP)
    text_encoder: str | None = key("Folder of the text encoder.", KEEP)
    tokenizer: str | None = key("Folder of the tokenizer.", KEEP)
    vae: str | None = key("Folder of the autoencoder.", KEEP)
    model_index: str | None = key("File that lists the components.", KEEP)


@dataclass(frozen=True, kw_only=True)
class PathsConfig(Section):
    """Where the pipeline's components come from."""

    pretrained_path: str = key("Base folder in the release layout, or a Hub name.")
    module_dict: ModuleDict = key("Component -> its custom path.", ModuleDict)
    module_config: ModuleConfigs = key("Component -> overlay of its config.json.", ModuleConfigs)
    target_path: str | None = key("Assemble the folder here, not in a temporary one.", None)

    def overlay(self, component: str) -> dict[str, Any]:
        """The values laid over a component's config.json."""
        values = getattr(self.module_config, component, {})
        return values.given() if isinstance(values, Overlay) else values

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`diffnext.pipelines.builder.get_pipeline_path`."""
        overlays = {item.name: self.overlay(item.name) for item in fields(self.module_config)}
        return {
            "pretrained_path": self.pretrained_path,
            "module_dict": self.module_dict.given() or None,
            "module_config": {name: values for name, values in overlays.items() if values} or None,
            "target_path": self.target_path,
        }


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """The training pipeline."""

    target: Target = key("Dotted path of the training pipeline class.")
    paths: PathsConfig = key("Arguments of get_pipeline_path.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimizer."""

    target: Target = key("Dotted path of the optimizer class.", "torch.optim.AdamW")
    params: dict = key("Its keyword arguments, such as lr, betas, weight_decay, fused.", {})


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig(Section):
    """The learning rate over time."""

    target: Target = key(
        "Dotted path of the schedule: ConstantLR, CosineLR or MultiStepLR.",
        "diffnext.engine.lr_scheduler.ConstantLR",
    )
    params: dict = key("Its keyword arguments, such as lr_max, lr_min, warmup_steps.", {})


@dataclass(frozen=True, kw_only=True)
class DataLoaderParams(Section):
    """Arguments of the loader."""

    dataset: Dataset = key("Folder of records, or several folders, with or without weights.")
    batch_size: Count = key("Examples per batch.", 1)
    seed: Natural = key("Seed for order and caption choice; the shard number is added.", 1337)
    shuffle: bool = key("Shuffle the examples.", True)
    num_workers: Natural = key("Reading processes; 0 reads in the training process.", 0)
    queue_depth: Count = key("Batches each reading process prepares ahead.", 2)
    shard_id: Natural | None = key("Shard of this process; null: its rank.", None)
    num_shards: Count | None = key("Number of shards; null: number of processes.", None)
    initial_fill: Count = key("Shuffling window, in examples.", 1024)
    stick_to_partition: bool = key("Read the same shard in every pass.", True)
    contiguous: bool = key("Stack the latents of a batch into one array.", True)
    max_examples: int | None = key("Written by a run (examples in the dataset).", None)
    prefetch_count: int = key("Accepted, but has no effect.", 50)
    start_method: StartMethod | None = key("How reading processes start.", None)
    timeout: NotNegative = key("Seconds to wait for a reading process; 0: without limit.", 120.0)


@dataclass(frozen=True, kw_only=True)
class DataLoaderConfig(Section):
    """The training data."""

    target: Target = key(
        "Dotted path of the loader class.", "diffnext.data.flex_loaders.FeatureDataLoader"
    )
    params: DataLoaderParams = key("Its keyword arguments.")


@dataclass(frozen=True, kw_only=True)
class EMAParams(Section):
    """Averaging of the weights."""

    decay: Share = key("Share of the old average that is kept at an update.", 0.99)
    update_every: Count = key("Steps between two updates.", 100)
    device: Literal["cpu", "gpu"] = key('"cpu" keeps the average in main memory.', "gpu")


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Section):
    """Exponential moving average of the weights; leave the section out to switch it off."""

    params: EMAParams = key("Arguments of ModelEMA.", EMAParams)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """How checkpoints are written."""

    format: Literal["safetensors", "bin"] = key("File format of the weights.", "safetensors")
    keep_last: Count | None = key("Keep only this many of the newest; null: keep all.", None)
    keep_every: Count | None = key("Never delete checkpoints at multiples of this step.", None)
    async_save: bool = key("Write while training continues; needs a copy in main memory.", False)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """Samples and held-out loss while training."""

    every: Count | None = key("Steps between two validations; null for none.", None)
    prompts: Texts | Integers | None = key("Prompts or classes; null: the dataset's.", None)
    seeds: Integers = key("Each prompt is sampled once with each of these seeds.", (0,))
    num_inference_steps: Count = key("Steps over which the tokens of a frame are generated.", 16)
    num_diffusion_steps: Count = key("Denoising steps per token.", 10)
    guidance_scale: NotNegative = key("Strength of classifier-free guidance.", 5.0)
    max_latent_length: Count | None = key("Latent frames; null: as many as trained on.", None)
    holdout: Holdout | str | None = key(
        "For the held-out loss: a share (the end) of each dataset, or a folder of records.", None
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The training loop."""

    max_train_steps: Count = key("Optimizer steps of the whole run.")
    batch_size: Count = key("Examples per process and micro-batch.", 1)
    gradient_accumulation_steps: Count = key("Micro-batches per optimizer step.", 1)
    seed: Seed = key("Seed of process 0; process r uses seed + r.", 1337)
    mixed_precision: Precision = key("no (or fp32, false), fp16 or bf16.", "bf16")
    max_grad_norm: Positive | None = key("Clip the gradient norm to this; null: do not.", None)
    on_nonfinite: Literal["stop", "skip"] = key(
        "After NaN or infinity in a loss or gradient: end the run, or leave the step out.", "stop"
    )
    compile: bool = key("Compile the blocks of the model; the first steps take minutes.", False)
    time_limit: Duration | None = key('Save and stop after this time, such as "23h30m".', None)
    process_group_timeout: Duration = key("How long a process waits for the others.", "2h")
    dry_run: bool = key("Check and estimate everything, without training.", False)
    progress_bar: bool = key("Show a live progress bar on process 0.", True)
    gpu_id: int | None = key("Written by a run (device index); ignored as input.", None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """A whole training configuration."""

    config: str = key("YAML file that the other arguments override.", "")
    trust_remote_code: bool = key("Run Python files of the base folder, whatever they do.", False)
    wandb: WandbConfig | None = key("Weights & Biases.", None)
    tracking: Trackers | None = key("Trackers; null: wandb if there is a wandb section.", None)
    experiment: ExperimentConfig = key("Run.")
    model: ModelConfig = key("Model.", ModelConfig)
    pipeline: PipelineConfig = key("Pipeline.")
    optimizer: OptimizerConfig = key("Optimizer.", OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = key("Learning rate.", LRSchedulerConfig)
    train_dataloader: DataLoaderConfig = key("Data.")
    ema: EMAConfig | None = key("Weight averaging.", None)
    checkpoint: CheckpointConfig = key("Checkpoints.", CheckpointConfig)
    validation: ValidationConfig = key("Validation.", ValidationConfig)
    training: TrainingConfig = key("Loop.")


@dataclass(frozen=True, kw_only=True)
class SchemaKey:
    """One dotted key of a schema."""

    path: str
    type_name: str
    default: Any
    meaning: str
    section: type | None
    is_open: bool
    is_optional: bool

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
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in fields(schema):
        alternatives = _alternatives(hints[item.name])
        section = next((h for h in alternatives if isinstance(h, type) and is_dataclass(h)), None)
        path = prefix + item.name
        yield SchemaKey(
            path=path,
            type_name=" | ".join(_type_name(hint) for hint in alternatives),
            default=item.default if item.default_factory is MISSING else item.default_factory(),
            meaning=item.metadata["meaning"],
            section=section,
            is_open=dict in alternatives,
            is_optional=type(None) in alternatives,
        )
        if section is not None:
            yield from iterate_schema(section, path + ".")


def look_up(tree: Any, path: str) -> tuple[bool, Any]:
    """Whether a tree of dicts has a dotted path, and its value."""
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False, None
        tree = tree[name]
    return True, tree


def describe_schema(schema: type) -> str:
    """Render the keys of a schema as the body of a help text.

    Args:
        schema: A dataclass as above.
    """
    lines = []
    for item in iterate_schema(schema):
        if item.section is not None:
            summary = inspect.cleandoc(item.section.__doc__ or "").splitlines()[0]
            lines += ["", f"{item.path}: {summary}"]
            continue
        default = "required" if item.required else f"default {_yaml_literal(item.default)}"
        lines.append(f"  {item.path}  ({item.type_name}, {default})")
        lines += textwrap.wrap(item.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if is_union else [hint]


def _type_name(hint: Any) -> str:
    """A type as people read it: the text among its annotations, if there is one."""
    if typing.get_origin(hint) is Annotated:
        return next(mark for mark in typing.get_args(hint) if isinstance(mark, str))
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    return "null" if hint is type(None) else inspect.formatannotation(hint)


def _yaml_literal(value: Any) -> str:
    """Write a default as one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if value == "" else str(value)
