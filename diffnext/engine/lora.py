"""Low-rank adapters (arXiv:2106.09685) by peft, in the files and names of diffusers.

Only the adapters are trained. A checkpoint of such a run holds ``pytorch_lora_weights.safetensors``
in the place of the transformer's folder, and loads like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from diffnext.engine.engine_utils import read_weights
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.omegaconf_utils import ConfigError

ADAPTER = "default"
COMPONENT = "transformer"  # prefix of the names in the file
ATTENTION = ("attn.qkv", "attn.proj")


def add_lora(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Freeze a model and add adapters, which change nothing at first.

    Args:
        model: A model with diffusers' adapter methods.
        options: The section ``model.lora``: rank, alpha, dropout, target_modules.

    Raises:
        ConfigError: If no linear layer has one of the names in ``target_modules``.
    """
    rank = options.get("rank", 16)
    targets = list(options.get("target_modules") or ATTENTION)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise ConfigError(
                f"model.lora.target_modules: no linear layer is named {target!r}, but there are "
                f"{', '.join(known)}"
            )
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=options.get("alpha") or rank,
        lora_dropout=options.get("dropout", 0.0),
        target_modules=targets,
    )
    model.add_adapter(config, ADAPTER)


def adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the adapters from the whole state dict of a model, under peft's names."""
    return get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=ADAPTER)


def adapter_metadata(model: nn.Module) -> dict[str, str]:
    """Rank, scale and targets of the adapters, under the key that diffusers reads."""
    config = {
        f"{COMPONENT}.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config[ADAPTER].to_dict().items()
    }
    return {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2)}


def write_adapter(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write adapters as ``pipe.load_lora_weights(folder)`` reads them.

    Args:
        folder: Folder, created if there is none.
        weights: From :func:`adapter_weights`.
        metadata: From :func:`adapter_metadata`.
    """
    tensors = {
        f"{COMPONENT}.{name}": value.detach().cpu().contiguous() for name, value in weights.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / LORA_FILE, metadata=dict(metadata))


def load_adapter(model: nn.Module, file: Path) -> None:
    """Load adapters into a model that has them.

    Args:
        model: Prepared by :func:`add_lora`.
        file: Written by :func:`write_adapter`.

    Raises:
        ConfigError: If they are of another rank or for other layers.
    """
    weights = {name.removeprefix(f"{COMPONENT}."): v for name, v in read_weights(file).items()}
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    for name, value in weights.items():
        if name not in expected or expected[name].shape != value.shape:
            raise ConfigError(
                f"model.lora does not fit {file}: {name} {tuple(value.shape)} is not among the "
                "adapters of this run"
            )
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
