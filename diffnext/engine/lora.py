"""Low-rank adapters (arXiv:2106.09685) by peft, in the files and names of diffusers.

Only the adapters are trained. A checkpoint of such a run holds ``pytorch_lora_weights.safetensors``
instead of the transformer's folder, and loads like any other.
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

from diffnext.config.schema import LoraOptions
from diffnext.config.targets import ConfigError
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.release_folder import LORA_FILE

ADAPTER = "default"
COMPONENT = "transformer"  # prefix of the names in the file
ATTENTION = ("attn.qkv", "attn.proj")


def add_lora(model: NOVATransformer3DModel, options: LoraOptions) -> None:
    """Freeze a model and add adapters, which change nothing at first.

    Args:
        model: A model with diffusers' adapter methods.
        options: The section ``model.lora``.

    Raises:
        ConfigError: If no linear layer has one of the names in ``target_modules``.
    """
    targets = list(options.target_modules or ATTENTION)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise ConfigError(
                f"model.lora.target_modules: no linear layer is named {target!r}, but there are "
                f"{', '.join(known)}"
            )
    model.requires_grad_(False)
    alpha: Any = options.alpha or options.rank  # peft's annotation takes whole numbers only
    config = LoraConfig(
        r=options.rank, lora_alpha=alpha, lora_dropout=options.dropout, target_modules=targets
    )
    model.add_adapter(config, ADAPTER)


def write_adapter(
    folder: Path, model: NOVATransformer3DModel, weights: Mapping[str, Tensor]
) -> None:
    """Write adapters as ``pipe.load_lora_weights(folder)`` reads them.

    Args:
        folder: Folder, created if there is none.
        model: The model that has them; its settings are written as well.
        weights: The state dict of a model, or the adapters in it.
    """
    adapters = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=ADAPTER)
    tensors = {
        f"{COMPONENT}.{name}": value.detach().cpu().contiguous() for name, value in adapters.items()
    }
    config = {
        f"{COMPONENT}.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in vars(model)["peft_config"][ADAPTER].to_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2)}
    save_file(tensors, folder / LORA_FILE, metadata=metadata)


def load_adapter(model: NOVATransformer3DModel, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load adapters into a model that has them.

    Args:
        model: Prepared by :func:`add_lora`.
        file: Written by :func:`write_adapter`.
        tensors: Its content.

    Raises:
        ConfigError: If they have another rank or belong to other layers.
    """
    weights = {name.removeprefix(f"{COMPONENT}."): value for name, value in tensors.items()}
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    for name, value in weights.items():
        if name not in expected or expected[name].shape != value.shape:
            raise ConfigError(
                f"model.lora does not fit {file}: {name} {tuple(value.shape)} is not among the "
                "adapters of this run"
            )
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
