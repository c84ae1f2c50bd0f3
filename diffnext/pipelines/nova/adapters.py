"""Low-rank adapters (arXiv:2106.09685) of a file that may come from a stranger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_pipeline import require_peft_backend
from pydantic import FiniteFloat, PositiveInt, StringConstraints, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from diffnext.models.packed_linear import forget_packed
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.component_files import own_path, reading
from diffnext.utils.folders import HUB_ARGUMENTS, find_folder

__all__ = ["AdapterLoading"]

# peft takes names for regular expressions, and a stranger's may run for ever.
ModuleName = Annotated[str, StringConstraints(pattern=r"^[\w.]+$")]


class AdapterConfig(TypedDict, total=False):
    """What is taken of the config in a file; peft would import modules that other keys name."""

    r: PositiveInt
    lora_alpha: int | FiniteFloat
    rank_pattern: dict[ModuleName, PositiveInt]
    alpha_pattern: dict[ModuleName, int | FiniteFloat]
    target_modules: list[ModuleName] | None
    exclude_modules: list[ModuleName] | None
    use_rslora: bool
    lora_bias: bool


class AdapterLoading(CogVideoXLoraLoaderMixin):
    """The methods of diffusers for adapters of a pipeline whose trained part is ``transformer``."""

    transformer: Any

    @require_peft_backend
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put adapters on the transformer.

        Args:
            pretrained_model_name_or_path_or_dict: Their safetensors file, its folder, a Hub id,
                or the weights themselves.
            *args: As for diffusers' method.
            **kwargs: The same: ``adapter_name``, ``weight_name``, ...

        Raises:
            FileNotFoundError: If there is no such folder or file.
            FileError: If the file is damaged or does not fit the transformer.
        """
        given = pretrained_model_name_or_path_or_dict
        name = "the state dict"
        if not isinstance(given, dict):
            file = _find_adapters(given, kwargs)
            given = name = str(file)
            kwargs |= {"weight_name": file.name, "use_safetensors": True}
        try:
            with reading(name, "adapters"):
                super().load_lora_weights(given, *args, **kwargs)
        except Exception:
            if not getattr(self.transformer, "peft_config", None):
                self.transformer.unload_lora()  # layers without weights
            raise

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapters to the weights.

        Args:
            *args: As for diffusers' method.
            **kwargs: The same.
        """
        super().fuse_lora(*args, **kwargs)
        forget_packed(self.transformer)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Take them off again.

        Args:
            *args: As for diffusers' method.
            **kwargs: The same.
        """
        super().unfuse_lora(*args, **kwargs)
        forget_packed(self.transformer)

    @classmethod
    def load_lora_into_transformer(cls, *args: Any, **kwargs: Any) -> None:
        """Put adapters on a transformer, with what is taken of their config.

        Args:
            *args: As for diffusers' method.
            **kwargs: The same; ``metadata`` is the config as it is in the file.
        """
        if kwargs.get("metadata") is not None:
            prefix = f"{cls.transformer_name}."
            values = {key.removeprefix(prefix): one for key, one in kwargs["metadata"].items()}
            config = TypeAdapter(AdapterConfig).validate_python(values, strict=True)
            kwargs["metadata"] = {prefix + key: one for key, one in config.items()}
        super().load_lora_into_transformer(*args, **kwargs)


def _find_adapters(given: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The file of adapters; takes what only says where it is out of the options."""
    name, subfolder = options.pop("weight_name", None), options.pop("subfolder", None)
    hub_kwargs = {key: options.pop(key) for key in HUB_ARGUMENTS if key in options}
    if Path(given).is_file():
        return Path(given)
    folder = find_folder(given, **hub_kwargs, allow_patterns="*.safetensors") / (subfolder or "")
    others = [] if name else sorted(path.name for path in folder.glob("*.safetensors"))
    for one in (name or LORA_FILE, *others):
        if own_path(folder, one).is_file():
            return folder / one
    raise FileNotFoundError(f"there are no adapters at {folder / (name or LORA_FILE)}")
