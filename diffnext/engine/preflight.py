"""Checks of a run's paths, done before anything is built."""

from __future__ import annotations

import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffnext.utils.omegaconf_utils import ConfigError, require_keys

REQUIRED_KEYS = (
    "experiment.output_dir",
    "pipeline.target",
    "pipeline.paths.pretrained_path",
    "optimizer.target",
    "lr_scheduler.target",
    "train_dataloader.params.dataset",
    "model.name",
    "training.max_train_steps",
    "training.seed",
)
COUNTS = (
    "experiment.log_every",
    "experiment.save_every",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "checkpoint.keep_last",
)


def check_config(config: DictConfig) -> None:
    """Check what can be checked without building anything.

    Args:
        config: Training configuration.

    Raises:
        ConfigError: Naming the first key whose value cannot work.
    """
    try:
        require_keys(config, REQUIRED_KEYS)
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration does not resolve: {error}") from error
    for path in COUNTS:
        value = OmegaConf.select(config, path)
        is_count = isinstance(value, int) and value >= 1
        if not is_count and not (value is None and path == "checkpoint.keep_last"):
            raise ConfigError(f"{path} must be a whole number of at least 1, got {value!r}")
    check_output_dir(config.experiment.output_dir)
    check_base_folder(config)
    count_examples(config.train_dataloader.params.dataset)


def check_output_dir(output_dir: str) -> None:
    """Check that a folder exists or can be made.

    Raises:
        ConfigError: If a file is in the way or the place is not writable.
    """
    path = Path(output_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise ConfigError(f"experiment.output_dir={output_dir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"experiment.output_dir={output_dir}: {existing} is not writable")


def check_base_folder(config: DictConfig) -> None:
    """Check that the base folder exists, unless its name can be one of the Hub.

    Raises:
        ConfigError: If there is no such folder or it has no model_index.json.
    """
    name = str(config.pipeline.paths.pretrained_path)
    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return
        raise ConfigError(f"pipeline.paths.pretrained_path={name}: no such folder")
    index = OmegaConf.select(config, "pipeline.paths.module_dict.model_index")
    index = Path(index) if index else folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"pipeline.paths.pretrained_path={name}: {index} does not exist")


def count_examples(dataset: str) -> int:
    """Read the number of examples of a record dataset.

    Args:
        dataset: Folder of records.

    Raises:
        ConfigError: If it is not a complete record dataset.
    """
    metadata = Path(dataset) / "METADATA"
    if not metadata.is_file():
        raise ConfigError(f"Unsupported dataset: {dataset} (it has no METADATA file)")
    try:
        return int(json.loads(metadata.read_text())["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Unsupported dataset: {dataset} (its METADATA is damaged)") from error
