"""Checks of the base folder and the model a configuration describes, without building it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffnext.models.transformers.transformer_nova import (
    IMAGE_DECODERS,
    IMAGE_ENCODERS,
    VIDEO_ENCODERS,
)
from diffnext.pipelines.release_folder import INDEX_FILE, read_base_reference
from diffnext.utils.omegaconf_utils import ConfigError, config_to_class
from diffnext.utils.weights_files import weights_files

OVERLAY = "pipeline.paths.module_config.transformer"
# The weights of the base folder fit no other values of these.
FIXED_BY_WEIGHTS = ("arch", "image_dim", "text_token_dim")
# How many whole numbers above 0 each size takes.
SIZES = {
    "image_dim": (1,),
    "image_size": (1, 2),
    "image_stride": (1,),
    "image_base_size": (2,),
    "video_base_size": (3,),
}
WITH_WEIGHTS = ("transformer", "vae", "text_encoder")


def check_pipeline(config: DictConfig) -> None:
    """Check the pipeline class.

    Args:
        config: Training configuration.

    Raises:
        ConfigError: If there is none of that name, or it does not train.
    """
    try:
        pipeline_class = config_to_class(config.pipeline)
    except ConfigError as error:
        raise ConfigError(f"pipeline.target: {error}") from error
    if not hasattr(pipeline_class, "configure_model"):
        raise ConfigError(f"pipeline.target={config.pipeline.target} is no training pipeline")


def check_transformer(config: DictConfig) -> None:
    """Check the sizes and the architecture of the transformer.

    Args:
        config: Training configuration; nothing is known of a base folder that is not here.

    Raises:
        ConfigError: Naming the first key that cannot work.
    """
    if not is_local(config):
        return
    sizes = transformer_sizes(config)
    check_sizes(sizes)
    check_architecture(sizes.get("arch"))
    check_weights_fit(config)


def is_local(config: DictConfig) -> bool:
    """Whether the base folder is on this machine, not a name of the Hub."""
    return Path(config.pipeline.paths.pretrained_path).expanduser().is_dir()


def check_components(config: DictConfig) -> None:
    """Check that the folder of each component exists, with weights where it needs some.

    Args:
        config: Training configuration; nothing is known of a base folder that is not here.

    Raises:
        ConfigError: Naming all that do not.
    """
    if not is_local(config):
        return
    replaced = OmegaConf.select(config, "pipeline.paths.module_dict") or {}
    path = index_path(config)
    index = read_config(path) if path.is_file() else {}
    indexed = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    missing = []
    for name in dict.fromkeys(["transformer", *replaced, *indexed]):
        folder = component_folder(config, name)
        if name == "model_index" or folder is None:
            continue
        where = f"pipeline.paths.module_dict.{name}" if name in replaced else "the base folder"
        if not folder.is_dir():
            missing.append(f"{where}: there is no folder {folder}")
        elif name in WITH_WEIGHTS and not weights_files(folder):
            missing.append(f"{where}: there are no weights in {folder}")
    if missing:
        raise ConfigError("; ".join(missing))


def component_folder(config: DictConfig, name: str) -> Path | None:
    """Where a component comes from; the folder need not exist.

    Args:
        config: Training configuration; its base folder may be a training checkpoint.
        name: Of the component.

    Returns:
        Its folder, or None if the configuration leaves it out.
    """
    base = Path(config.pipeline.paths.pretrained_path).expanduser()
    given = OmegaConf.select(config, "pipeline.paths.module_dict") or {}
    if name in given and not given[name]:
        return None
    folder = Path(given[name]).expanduser() if name in given else base / name
    older_base, elsewhere = read_base_reference(base)
    if older_base is not None and folder == base / name and not folder.exists():
        return elsewhere.get(name, older_base / name)
    return folder


def component_config(config: DictConfig, name: str) -> dict[str, Any]:
    """The config.json of a component with the overlay of ``module_config`` on it.

    Args:
        config: Training configuration.
        name: Of the component.

    Returns:
        The values; of a component without config.json only the overlay.
    """
    overlay = OmegaConf.select(config, f"pipeline.paths.module_config.{name}") or {}
    return {**_folder_config(config, name), **_to_plain(overlay)}


def transformer_sizes(config: DictConfig) -> dict[str, Any]:
    """The arguments of the transformer, as far as configuration and base folder tell them."""
    return component_config(config, "transformer")


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Check that the sizes of the transformer are there.

    Args:
        sizes: See :func:`transformer_sizes`.

    Raises:
        ConfigError: Naming the first that is missing or has no such value.
    """
    for name, counts in SIZES.items():
        value = sizes.get(name)
        numbers = value if isinstance(value, list) else [value]
        is_whole = all(isinstance(number, int) and number >= 1 for number in numbers)
        if not is_whole or len(numbers) not in counts:
            count = " or ".join(str(count) for count in counts)
            raise ConfigError(f"{OVERLAY}.{name} must be {count} whole numbers, got {value}")
    if sizes.get("text_token_dim") and not sizes.get("text_token_len"):
        raise ConfigError(f"{OVERLAY}.text_token_len is required beside text_token_dim")


def check_architecture(arch: Any) -> None:
    """Check that the three parts of the model exist.

    Raises:
        ConfigError: If there are not three, or one is unknown.
    """
    registries = (VIDEO_ENCODERS, IMAGE_ENCODERS, IMAGE_DECODERS)
    if not isinstance(arch, list) or len(arch) != len(registries):
        raise ConfigError(
            f"{OVERLAY}.arch must name video encoder, image encoder and decoder, got {arch!r}"
        )
    for name, registry in zip(arch, registries, strict=True):
        if registry.has(name):
            continue
        close = difflib.get_close_matches(str(name), list(registry.registry), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(registry.registry)}"
        raise ConfigError(f"{OVERLAY}.arch: {name!r} is not among the {registry.name}; {hint}")


def check_weights_fit(config: DictConfig) -> None:
    """Check that the overlay asks for no sizes that the weights of the base folder do not have.

    Raises:
        ConfigError: Naming key and both values.
    """
    saved = _folder_config(config, "transformer")
    wanted = transformer_sizes(config)
    for name in FIXED_BY_WEIGHTS:
        if name in saved and wanted.get(name) != saved[name]:
            raise ConfigError(
                f"{OVERLAY}.{name} is {wanted.get(name)}, but the weights in "
                f"{component_folder(config, 'transformer')} were made with {saved[name]}"
            )


def check_base_folder(config: DictConfig) -> None:
    """Check that the base folder exists, unless its name can be one of the Hub.

    Raises:
        ConfigError: If there is no such folder or it has no readable model_index.json.
    """
    name = str(config.pipeline.paths.pretrained_path)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return
        raise ConfigError(f"pipeline.paths.pretrained_path={name}: no such folder")
    index = index_path(config)
    if not index.is_file():
        raise ConfigError(f"pipeline.paths.pretrained_path={name}: {index} does not exist")
    read_config(index)


def index_path(config: DictConfig) -> Path:
    """The file that names the components."""
    given = OmegaConf.select(config, "pipeline.paths.module_dict.model_index")
    base = Path(config.pipeline.paths.pretrained_path).expanduser()
    return Path(given).expanduser() if given else base / INDEX_FILE


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object")
    return content


def _folder_config(config: DictConfig, name: str) -> dict[str, Any]:
    folder = component_folder(config, name)
    path = None if folder is None else folder / "config.json"
    return read_config(path) if path is not None and path.is_file() else {}


def _to_plain(overlay: Any) -> Mapping[str, Any]:
    return OmegaConf.to_container(overlay, resolve=True) if OmegaConf.is_config(overlay) else {}
