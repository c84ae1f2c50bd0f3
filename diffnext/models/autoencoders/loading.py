"""Loading an autoencoder of any class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from diffnext.models.modeling_utils import MODEL_MODULES, find_model_class
from diffnext.utils.component_files import own_path
from diffnext.utils.json_files import read_json


def find_autoencoder(folder: str | os.PathLike[str]) -> Path:
    """The folder of an autoencoder: ``folder`` itself, or ``vae`` in a release folder.

    Raises:
        FileError: If ``vae`` is a link that leads out of the folder.
        FileNotFoundError: If neither has a config.json.
    """
    for place in (own_path(Path(folder), "vae"), Path(folder)):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"{folder} has no autoencoder: neither config.json nor vae/config.json")


def load_autoencoder(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """Load an autoencoder for inference, of the class that its config.json names.

    Args:
        folder: See :func:`find_autoencoder`.
        dtype: Type of the weights.
        device: Where to put it.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its class is not one of this package, or its config is damaged.
    """
    place = find_autoencoder(folder)
    name = read_autoencoder_config(place).get("_class_name")
    known = [name for name in MODEL_MODULES if name.startswith("AutoencoderKL")]
    if name not in known:
        raise ValueError(
            f"{place}/config.json names the class {name!r}; known are {', '.join(known)}"
        )
    model = find_model_class(name).from_pretrained(place, dtype=dtype)
    return model.eval().requires_grad_(False).to(device)


def read_autoencoder_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of an autoencoder.

    Raises:
        FileError: If it is not a JSON object, or a link that leads out of the folder.
    """
    return read_json(own_path(Path(folder), "config.json"))
