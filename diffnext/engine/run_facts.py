"""What a training configuration amounts to: sizes of model, frozen components and dataset.

Nothing is loaded but configs, file headers and a few records.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import nn
from transformers import PhiConfig

from diffnext.data.example_order import ExampleOrder
from diffnext.engine.data_check import check_batches, count_examples, read_samples
from diffnext.engine.memory import BatchShape, count_parameters, make_meta_model
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.builder import get_pipeline_path
from diffnext.pipelines.release_folder import find_folder, resolve_index
from diffnext.utils.json_files import read_json
from diffnext.utils.omegaconf_utils import ConfigError, config_to_class, config_to_object

TRANSFORMER = "transformer"
FROZEN = ("vae", "text_encoder")  # with the transformer, the components that have weights
# Latent frames assumed where no dataset tells: 33 frames of video, 4 to a latent after the first.
DEFAULT_VIDEO_FRAMES = 9
# Phi-2, which the released models read text with; assumed where no text encoder is at hand.
PHI2 = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The trained model and what is loaded beside it.

    Attributes:
        config: Arguments of the transformer.
        make: Builds it on the meta device, ready for training.
        frozen_parameters: Parameters of each frozen component.
        notes: What had to be assumed.
        problems: Weights of the base folder that do not fit.
    """

    config: dict[str, Any]
    make: Callable[[], NOVATransformer3DModel]
    frozen_parameters: dict[str, int]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What some records of a dataset tell about it.

    Attributes:
        num_examples: Records.
        moments: Shape of the posterior moments, (2C, h, w) or (2C, T, h, w).
        dtype: Of the moments.
        prompt: What the model is conditioned on, in words.
        record_bytes: Mean size of the sampled records' arrays and captions.
    """

    num_examples: int
    moments: tuple[int, ...]
    dtype: str
    prompt: str
    record_bytes: int


def inspect_model(config: DictConfig) -> ModelFacts:
    """Find the model that a run would train; the base folder may lack files, or be missing.

    Args:
        config: Training configuration.

    Raises:
        KeyError: If the architecture is unknown.
        TypeError: If an argument of the transformer is unknown or missing.
        ValueError: If an argument is out of range.
    """
    notes: list[str] = []
    paths = OmegaConf.to_container(config.pipeline.paths, resolve=True)
    folder = _assemble(paths, notes)
    transformer_config = _transformer_config(folder, paths)
    pipeline_class = config_to_class(config.pipeline)

    def make() -> NOVATransformer3DModel:
        model = make_meta_model(
            transformer_config,
            frozen_modules=pipeline_class.frozen_modules,
            gradient_checkpointing=config.model.get("gradient_checkpointing", 0),
            loss_repeat=config.model.get("loss_repeat", 4),
        )
        if config.model.get("lora"):
            from diffnext.engine.lora import add_lora

            with torch.device("meta"):
                add_lora(model, config.model.lora)
        return model

    bare_model = make_meta_model(transformer_config)
    problems = [] if folder is None else _misfits(folder / TRANSFORMER, bare_model)
    dropped = [name for name, path in (paths.get("module_dict") or {}).items() if not path]
    frozen = _count_frozen(folder, transformer_config, dropped, notes)
    return ModelFacts(
        config=transformer_config,
        make=make,
        frozen_parameters=frozen,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def inspect_dataset(config: DictConfig) -> DatasetFacts | None:
    """Read some records, evenly spaced, as training would.

    Args:
        config: Training configuration.

    Returns:
        What they tell; None if they cannot be read or cannot be in one batch.
    """
    folder = config.train_dataloader.params.dataset
    try:
        num_examples = count_examples(folder)
        samples = read_samples(folder, folder)
        check_batches(folder, samples)
    except ConfigError:
        return None
    first = samples[0]
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    prompt_bytes = sum(_prompt_bytes(prompt) for prompt in prompts) / len(prompts)
    return DatasetFacts(
        num_examples=num_examples,
        moments=first.shape,
        dtype=str(first.dtype),
        prompt=_describe_prompt(first.prompts[0]),
        record_bytes=math.prod(first.shape) * first.dtype.itemsize + round(prompt_bytes),
    )


def batch_shape(
    size: int, transformer: Mapping[str, Any], dataset: DatasetFacts | None = None
) -> BatchShape:
    """The shapes of a micro-batch, by the dataset or, without one that fits, by the model.

    Args:
        size: Samples.
        transformer: Arguments of the transformer.
        dataset: What is known of the dataset.
    """
    if dataset is not None and fits_model(transformer, dataset):
        frames = dataset.moments[1] if len(dataset.moments) == 4 else 1
    else:
        frames = DEFAULT_VIDEO_FRAMES if transformer["video_base_size"][0] > 1 else 1
    return BatchShape(size=size, frames=frames, latent_size=_latent_size(transformer))


def fits_model(transformer: Mapping[str, Any], dataset: DatasetFacts) -> bool:
    """Whether a dataset's latents have the size the model is built for."""
    return (
        len(dataset.moments) in (3, 4)
        and dataset.moments[0] == 2 * transformer["image_dim"]
        and dataset.moments[-2:] == _latent_size(transformer)
    )


def _latent_size(transformer: Mapping[str, Any]) -> tuple[int, int]:
    sides = transformer["image_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    stride = transformer["image_stride"]
    return height // stride, width // stride


def shard_sizes(num_examples: int, num_shards: int) -> tuple[int, int]:
    """Examples of every shard but the last, and of the last.

    Raises:
        ValueError: If shards would be empty.
    """
    order = ExampleOrder(num_examples=num_examples, num_shards=num_shards)
    return order.shard_size, num_examples - order.shard_size * (num_shards - 1)


def optimizer_states(config: DictConfig) -> float:
    """Numbers that the configured optimizer keeps for each parameter, found by one step."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = config_to_object(config.optimizer, params=[parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim) / parameter.numel()


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or main memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoints_kept(config: DictConfig) -> int:
    """Most checkpoints on disk at a time, the one being written included."""
    written = math.ceil(config.training.max_train_steps / config.experiment.save_every)
    keep_last = OmegaConf.select(config, "checkpoint.keep_last")
    if keep_last is None:
        return written
    keep_every = OmegaConf.select(config, "checkpoint.keep_every")
    pinned = config.training.max_train_steps // keep_every if keep_every else 0
    return min(written, keep_last + 1 + pinned)


def _assemble(paths: Mapping[str, Any], notes: list[str]) -> Path | None:
    """The base folder with replaced components and overlays, as the run would see it."""
    base = paths["pretrained_path"]
    try:
        folder = find_folder(base, local_files_only=True)
        return Path(get_pipeline_path(folder, paths.get("module_dict"), paths.get("module_config")))
    except (FileNotFoundError, NotADirectoryError):
        notes.append(f"the base folder {base} is not complete")
    except Exception as error:  # huggingface_hub has many ways to say that it has no copy
        if not type(error).__module__.startswith("huggingface_hub"):
            raise
        notes.append(f"{base} is not on this machine: the run would download it")
    notes.append("sizes are those of pipeline.paths.module_config")
    return None


def _transformer_config(folder: Path | None, paths: Mapping[str, Any]) -> dict[str, Any]:
    if folder is not None and (folder / TRANSFORMER / "config.json").is_file():
        config = read_json(folder / TRANSFORMER / "config.json")
    else:
        config = (paths.get("module_config") or {}).get(TRANSFORMER) or {}
    return {k: v for k, v in config.items() if not k.startswith("_") and v is not None}


def _misfits(folder: Path, model: nn.Module) -> list[str]:
    """Weights of other names or shapes than the model's, by the headers of safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if not files or not differing:
        return []
    first = differing[0]
    return [
        f"{len(differing)} weights of the base folder's transformer do not fit the model: {first} "
        f"is {found.get(first, 'missing')}, not {wanted.get(first, 'known')}"
    ]


def _count_frozen(
    folder: Path | None, transformer: Mapping[str, Any], dropped: list[str], notes: list[str]
) -> dict[str, int]:
    """Parameters of the components that are loaded beside the model."""
    counts = {}
    index = {} if folder is None else resolve_index(folder)
    for name in FROZEN:
        if name in dropped or (name == "text_encoder" and not transformer.get("text_token_dim")):
            continue
        if folder is not None and index.get(name) is None:
            continue
        file = None if folder is None else folder / name / "config.json"
        if file is not None and file.is_file():
            model = _build_component(read_json(file), *index[name])
        else:
            model = _assumed_component(name, transformer)
            count = count_parameters(model) / 1e6
            notes.append(f"{name}: no config.json, assumed {type(model).__name__}, {count:.0f} M")
        counts[name] = count_parameters(model)
    return counts


def _build_component(config: dict[str, Any], library: str, class_name: str) -> nn.Module:
    component_class = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if hasattr(component_class, "from_config"):  # diffusers
            return component_class.from_config(config)
        return component_class(component_class.config_class.from_dict(config))


def _assumed_component(name: str, transformer: Mapping[str, Any]) -> nn.Module:
    is_video = transformer["video_base_size"][0] > 1
    autoencoder = AutoencoderKLOpenSora if is_video else AutoencoderKL
    with torch.device("meta"):
        if name == "text_encoder":
            return PhiEncoderModel(PhiConfig(**PHI2))
        return autoencoder(latent_channels=transformer["image_dim"])


def _prompt_bytes(prompt: Any) -> int:
    return prompt.nbytes if isinstance(prompt, np.ndarray) else len(str(prompt).encode())


def _describe_prompt(prompt: Any) -> str:
    if isinstance(prompt, np.ndarray):
        return f"cached text states, {tuple(prompt.shape)} {prompt.dtype}"
    return "captions as text" if isinstance(prompt, str) else "class labels"
