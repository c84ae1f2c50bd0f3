"""Checks of the records a run trains on against its model, its autoencoder and its processes.

Shapes: C latent channels, T latent frames, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from diffnext.data.caching.manifest import MANIFEST_NAME
from diffnext.data.example_order import ExampleOrder
from diffnext.data.flex_loaders import LoaderOptions
from diffnext.data.flex_pipelines import FeaturePipe
from diffnext.data.records import METADATA_NAME, RecordDataset, RecordError
from diffnext.engine.model_check import (
    OVERLAY,
    component_config,
    component_folder,
    is_local,
    read_config,
    transformer_sizes,
)
from diffnext.models.embeddings import LabelEmbed
from diffnext.utils.config_schema import DataLoaderConfig
from diffnext.utils.omegaconf_utils import ConfigError, config_to_class
from diffnext.utils.weights_files import hash_weights

logger = logging.getLogger(__name__)

DATASET = "train_dataloader.params.dataset"
HOLDOUT = "validation.holdout"
MAX_HOLDOUT = 0.5
SAMPLES = 8  # records looked at
# A pipeline that freezes it does not train what reads earlier frames.
READS_EARLIER_FRAMES = "video_encoder.patch_embed"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a record gives to the training.

    Attributes:
        name: Of the record, for messages.
        shape: Of the moments: (2C, h, w) or (2C, T, h, w).
        dtype: Of the moments.
        prompts: All that may become its prompt: texts, text states (L, D), or a class.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    prompts: list[Any]


def check_dataset(config: DictConfig) -> None:
    """Check that the dataset, and a folder of held-out records, can be read and shared out.

    Records of other loaders than the package's are not looked at.

    Args:
        config: Training configuration with its defaults.

    Raises:
        ConfigError: Naming the key and its value.
    """
    try:
        config_to_class(config.train_dataloader)
    except ConfigError as error:
        raise ConfigError(f"train_dataloader.target: {error}") from error
    num_examples = count_examples(config.train_dataloader.params.dataset)
    holdout = check_holdout(config, num_examples)
    if not _reads_records(config):
        return
    check_loader(config, num_examples - count_holdout(holdout, num_examples))
    for key, folder in _folders(config).items():
        check_batches(f"{key}={folder}", read_samples(f"{key}={folder}", folder))


def check_records(config: DictConfig) -> None:
    """Check records against the pipeline, the model and the autoencoder.

    Args:
        config: Training configuration with its defaults, its dataset and model checked.

    Raises:
        ConfigError: Naming the keys that do not fit together and both values.
    """
    if not _reads_records(config):
        return
    for key, folder in _folders(config).items():
        samples = read_samples(f"{key}={folder}", folder)
        check_frames(config, samples)
        if is_local(config):
            check_manifest(config, f"{key}={folder}", Path(folder), samples)
            check_latents(config, samples)
            check_prompts(config, samples)
            check_autoencoder(config, f"{key}={folder}", samples)
        if key == DATASET:
            check_validation_prompts(config, samples)


def _reads_records(config: DictConfig) -> bool:
    return config.train_dataloader.target == DataLoaderConfig().target


def _folders(config: DictConfig) -> dict[str, str]:
    """Folders of records by the key that names them."""
    holdout = OmegaConf.select(config, HOLDOUT)
    held_out = {HOLDOUT: holdout} if isinstance(holdout, str) else {}
    return {DATASET: config.train_dataloader.params.dataset, **held_out}


def count_examples(dataset: str) -> int:
    """Read the number of examples of a record dataset.

    Args:
        dataset: Folder of records.

    Raises:
        ConfigError: If it is not a complete record dataset.
    """
    metadata = Path(dataset) / METADATA_NAME
    if not metadata.is_file():
        nested = sorted(path.parent.name for path in Path(dataset).glob(f"*/{METADATA_NAME}"))
        hint = f"; the datasets in it are {', '.join(nested)}" if nested else ""
        raise ConfigError(f"Unsupported dataset: {dataset} (it has no METADATA file{hint})")
    try:
        return int(json.loads(metadata.read_text())["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Unsupported dataset: {dataset} (its METADATA is damaged)") from error


def count_holdout(holdout: float | str | None, num_examples: int) -> int:
    """How many examples at the end of the training dataset are kept for validation.

    Args:
        holdout: ``validation.holdout``: a share of the dataset; a folder or None keeps none.
        num_examples: Size of the training dataset.
    """
    return round(holdout * num_examples) if isinstance(holdout, float) else 0


def count_training_examples(config: DictConfig) -> int:
    """Examples of the training dataset without those kept for validation.

    Args:
        config: Training configuration.
    """
    count = count_examples(config.train_dataloader.params.dataset)
    return count - count_holdout(OmegaConf.select(config, "validation.holdout"), count)


def check_holdout(config: DictConfig, num_examples: int) -> float | str | None:
    """Check ``validation.holdout``.

    Args:
        config: Training configuration.
        num_examples: Size of the training dataset.

    Returns:
        Its value.

    Raises:
        ConfigError: If it is neither a share of at least one example nor a folder of records.
    """
    holdout = OmegaConf.select(config, HOLDOUT)
    if holdout is None:
        return None
    if isinstance(holdout, str):
        if not (Path(holdout) / METADATA_NAME).is_file():
            raise ConfigError(
                f"{HOLDOUT}={holdout} is neither a share nor a folder of records with a METADATA"
            )
        return holdout
    if not 0 < holdout <= MAX_HOLDOUT:
        raise ConfigError(f"{HOLDOUT} must be above 0 and at most {MAX_HOLDOUT}, got {holdout}")
    if count_holdout(holdout, num_examples) == 0:
        raise ConfigError(f"{HOLDOUT}={holdout} keeps none of the {num_examples} examples")
    return holdout


def check_loader(config: DictConfig, num_examples: int) -> None:
    """Check the options of the loader, and that every process has something to read.

    Args:
        config: Training configuration.
        num_examples: Examples to train on.

    Raises:
        ConfigError: If an option is out of range or a shard would be empty.
    """
    params = OmegaConf.to_container(config.train_dataloader.params, resolve=True)
    params = {name: value for name, value in params.items() if name != "dataset"}
    if params.get("shard_id") is None:  # the run sets both
        params |= {"shard_id": 0, "num_shards": int(os.environ.get("WORLD_SIZE", 1))}
    try:
        options = LoaderOptions.from_keywords(params)
        order = ExampleOrder(
            num_examples=num_examples,
            shard_id=options.num_shards - 1,
            num_shards=options.num_shards,
            initial_fill=options.initial_fill,
            seed=options.seed + options.num_shards - 1,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train_dataloader.params: {error}") from error
    _warn_of_batches(config, options, num_examples - order.shard_size * (options.num_shards - 1))


def read_samples(name: str, folder: str) -> list[Sample]:
    """Read records evenly spaced over a dataset, as the loader does.

    Args:
        name: Key and folder, for messages.
        folder: Of the dataset.

    Raises:
        ConfigError: If the dataset or one of the records is damaged or lacks something.
    """
    try:
        with RecordDataset(folder) as dataset:
            if "codes" in dataset.features and "moments" not in dataset.features:
                raise ConfigError(f"{name} holds VQ codes, training needs VAE moments")
            indices = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset)))
            return [_read_sample(dataset, int(index)) for index in indices]
    except (RecordError, OSError) as error:
        raise ConfigError(f"{name}: {error}") from error


def check_batches(name: str, samples: list[Sample]) -> None:
    """Check that records can be stacked to a batch.

    Raises:
        ConfigError: If there are none, or two differ in the shape of their moments.
    """
    if not samples:
        raise ConfigError(f"{name} has no examples")
    for sample in samples:
        if sample.shape != samples[0].shape:
            raise ConfigError(
                f"{samples[0].name} and {sample.name} have moments of the shapes "
                f"{samples[0].shape} and {sample.shape}: they cannot be in one batch"
            )
        if not np.issubdtype(sample.dtype, np.floating):
            raise ConfigError(f"{sample.name} has moments of {sample.dtype}, not of floats")


def check_frames(config: DictConfig, samples: list[Sample]) -> None:
    """Check that an image pipeline gets images and a video pipeline videos.

    Raises:
        ConfigError: If it is the other way round.
    """
    frozen = getattr(config_to_class(config.pipeline), "frozen_modules", None)
    if frozen is None:
        return
    trains_videos = READS_EARLIER_FRAMES not in frozen
    target = f"pipeline.target={config.pipeline.target}"
    for sample in samples:
        if len(sample.shape) not in (3, 4):
            raise ConfigError(
                f"{sample.name} has moments of shape {sample.shape}, they must be (2C, h, w) or "
                "(2C, T, h, w)"
            )
        if len(sample.shape) == 3 and trains_videos:
            raise ConfigError(
                f"{target} trains on videos, but {sample.name} is an image: its moments are "
                f"(2C, h, w) = {sample.shape}"
            )
        if len(sample.shape) == 4 and sample.shape[1] > 1 and not trains_videos:
            raise ConfigError(
                f"{target} trains on images, but {sample.name} is a video: its moments are "
                f"(2C, T, h, w) = {sample.shape}"
            )


def check_latents(config: DictConfig, samples: list[Sample]) -> None:
    """Check the channels and the size of the latents against the model.

    Raises:
        ConfigError: If they differ.
    """
    sizes = transformer_sizes(config)
    channels = sizes["image_dim"]
    image_size = sizes["image_size"]
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    stride = sizes["image_stride"]
    for sample in samples:
        if sample.shape[0] != 2 * channels:
            raise ConfigError(
                f"{OVERLAY}.image_dim is {channels}, which needs moments of {2 * channels} "
                f"channels, but {sample.name} has {sample.shape[0]}: was it made with another VAE?"
            )
        if sample.shape[-2:] != (height // stride, width // stride):
            raise ConfigError(
                f"{OVERLAY}.image_size {[height, width]} at image_stride {stride} means latents "
                f"of {height // stride}x{width // stride}, but {sample.name} has "
                f"{sample.shape[-2]}x{sample.shape[-1]}"
            )


def check_prompts(config: DictConfig, samples: list[Sample]) -> None:
    """Check captions, cached text states or classes against the model.

    Raises:
        ConfigError: If they do not fit.
    """
    sizes = transformer_sizes(config)
    for sample in samples:
        for prompt in sample.prompts:
            if sizes.get("text_token_dim"):
                _check_text(config, sizes, sample.name, prompt)
            else:
                _check_class(f"{sample.name} has", prompt)


def check_manifest(config: DictConfig, name: str, dataset: Path, samples: list[Sample]) -> None:
    """Check what a dataset tells of itself in ``manifest.json``, as far as it has one.

    Args:
        config: Training configuration.
        name: Key and folder of the dataset, for messages.
        dataset: Folder of the dataset.
        samples: Some of its records.

    Raises:
        ConfigError: If the manifest is not that of the records, or autoencoder, text encoder, dtype
            or size are not those of the run.
    """
    path = dataset / MANIFEST_NAME
    if not path.is_file():
        return
    manifest = read_config(path)
    _check_manifest_records(name, path, manifest, count_examples(str(dataset)), samples[0])
    _check_same_weights(config, "vae", "VAE", name, path, manifest.get("vae_hash"))
    text_encoder = manifest.get("text_encoder") or {}
    _check_same_weights(
        config, "text_encoder", "text encoder", name, path, text_encoder.get("hash")
    )
    size = manifest.get("size")
    image_size = transformer_sizes(config)["image_size"]
    wanted = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if size is not None and size != wanted:
        raise ConfigError(
            f"{name} was made for {size[0]}x{size[1]} pixels (see {path}), but "
            f"{OVERLAY}.image_size is {wanted}"
        )


def _check_manifest_records(
    name: str, path: Path, manifest: Mapping[str, Any], count: int, sample: Sample
) -> None:
    """Check that a manifest is that of the records beside it.

    Raises:
        ConfigError: If it is not.
    """
    dtype = manifest.get("dtype", sample.dtype.name)
    if dtype != sample.dtype.name:
        raise ConfigError(
            f"{name} has moments of {dtype} (see {path}), training reads {sample.dtype.name}"
        )
    shape = manifest.get("shape")
    if shape is not None and tuple(shape) != sample.shape:
        raise ConfigError(
            f"{path} tells moments of the shape {tuple(shape)}, but {sample.name} has "
            f"{sample.shape}: it belongs to other records"
        )
    counted = (manifest.get("counts") or {}).get("examples", count)
    if counted != count:
        raise ConfigError(
            f"{path} counts {counted} examples, METADATA {count}: it belongs to other records"
        )


def _check_same_weights(
    config: DictConfig, component: str, what: str, name: str, path: Path, expected: str | None
) -> None:
    """Check that a component of the run is the one that a dataset was made with, if it tells.

    Raises:
        ConfigError: If it is another one.
    """
    folder = component_folder(config, component)
    if expected is None or folder is None:
        return
    found = hash_weights(folder)
    if found != expected:
        raise ConfigError(
            f"{name} was made with another {what} than the one in {folder}: {path} names one with "
            f"the hash {expected}, not {found}"
        )


def check_autoencoder(config: DictConfig, name: str, samples: list[Sample]) -> None:
    """Check that latents can be those of the autoencoder of the run.

    Args:
        config: Training configuration.
        name: Key and folder of the dataset, for messages.
        samples: Some of its records.

    Raises:
        ConfigError: If they were made with another one.
    """
    folder = component_folder(config, "vae")
    if folder is None:
        raise ConfigError("pipeline.paths.module_dict.vae is empty, but training needs the VAE")
    channels = component_config(config, "vae").get("latent_channels")
    found = samples[0].shape[0] // 2
    if isinstance(channels, int) and channels != found:
        raise ConfigError(
            f"{name} was made with another VAE: it has {found} latent channels, the VAE in "
            f"{folder} has {channels}"
        )


def check_validation_prompts(config: DictConfig, samples: list[Sample]) -> None:
    """Check that there is something to validate, and that the prompts suit the model.

    Raises:
        ConfigError: If not.
    """
    options = config.get("validation") or {}
    prompts = options.get("prompts")
    if options.get("every") is not None and prompts is None and options.get("holdout") is None:
        if all(isinstance(prompt, np.ndarray) for s in samples for prompt in s.prompts):
            raise ConfigError(
                f"validation.every={options.every} has nothing to draw: the dataset has cached "
                "text states in place of captions; set validation.prompts or validation.holdout"
            )
    if prompts is None or not is_local(config):
        return
    sizes = transformer_sizes(config)
    for prompt in prompts:
        if sizes.get("text_token_dim"):
            _check_text(config, sizes, "validation.prompts", prompt)
        else:
            _check_class("validation.prompts has", prompt)


def _read_sample(dataset: RecordDataset, index: int) -> Sample:
    example = dataset[index]
    name = dataset.describe(index)
    pipe = FeaturePipe()
    try:
        # The short caption is chosen below a half.
        outputs = [pipe.get_outputs(example, lambda: draw) for draw in (0.0, 0.9)]  # noqa: B023
    except (LookupError, TypeError, ValueError) as error:
        raise RecordError(f"{name}: {error}") from error
    prompts = [prompt for output in outputs for prompt in output["prompt"]]
    moments = outputs[0]["latents"][0]
    return Sample(name=name, shape=moments.shape, dtype=moments.dtype, prompts=prompts)


def _check_text(config: DictConfig, sizes: Mapping[str, Any], name: str, prompt: Any) -> None:
    width = sizes["text_token_dim"]
    length = sizes["text_token_len"]
    if isinstance(prompt, str):
        for component in ("text_encoder", "tokenizer"):
            if component_folder(config, component) is None:
                raise ConfigError(
                    f"pipeline.paths.module_dict.{component} is empty, but {name} has a text"
                )
        return
    if not isinstance(prompt, np.ndarray):
        raise ConfigError(
            f"{OVERLAY}.text_token_dim is {width}, so the model reads texts, but {name} has the "
            f"class {prompt}"
        )
    if prompt.ndim != 2 or prompt.shape[1] != width or prompt.shape[0] > length:
        raise ConfigError(
            f"{OVERLAY}.text_token_dim and text_token_len are {width} and {length}, but {name} has "
            f"cached text states of shape (L, D) = {prompt.shape}"
        )


def _check_class(name: str, prompt: Any) -> None:
    num_classes = inspect.signature(LabelEmbed).parameters["num_classes"].default
    if not isinstance(prompt, int):
        raise ConfigError(
            f"{OVERLAY}.text_token_dim is null, so the model reads classes, but {name} a text"
        )
    if not 0 <= prompt < num_classes:
        raise ConfigError(f"classes must be 0 to {num_classes - 1}, but {name} {prompt}")


def _warn_of_batches(config: DictConfig, options: LoaderOptions, smallest_shard: int) -> None:
    """Warn of batches that work but are hardly meant."""
    if os.environ.get("RANK", "0") != "0":
        return
    if options.batch_size > smallest_shard:
        logger.warning(
            "train_dataloader.params.batch_size is %d, but a process has only %d examples: they "
            "repeat inside a batch",
            options.batch_size,
            smallest_shard,
        )
    if options.batch_size != config.training.batch_size:
        logger.warning(
            "train_dataloader.params.batch_size is %d and training.batch_size is %d: the first "
            "counts, reports assume the second",
            options.batch_size,
            config.training.batch_size,
        )
