"""Loading a model, and what its card says about using it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard

from diffnext.pipelines import NOVAPipeline
from diffnext.utils.component_files import own_path, read_base_reference

__all__ = ["Defaults", "Ranges", "load_pipeline", "model_name", "read_defaults"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Least and greatest values of the sliders."""

    guidance_scale: tuple[float, float] = (1, 10)
    num_inference_steps: tuple[int, int] = (1, 128)
    num_diffusion_steps: tuple[int, int] = (1, 50)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the page shows at first.

    Attributes:
        guidance_scale: Weight of the prompt.
        num_inference_steps: Sets of tokens a frame.
        num_diffusion_steps: Denoising steps a set.
        negative_prompt: What to avoid.
        examples: Prompts to choose from; the first is in the prompt box.
    """

    guidance_scale: float
    num_inference_steps: int
    num_diffusion_steps: int
    negative_prompt: str
    examples: tuple[str, ...]


def load_pipeline(folder: Path, device_index: int, precision: str | None) -> NOVAPipeline:
    """Load a model on the GPU, or on the CPU where there is none.

    Args:
        folder: Of the model.
        device_index: Which GPU.
        precision: Name of a dtype; None is float16 on a GPU and float32 on a CPU.

    Raises:
        FileNotFoundError: If a part of it is missing.
        RuntimeError: If its weights do not fit.
        ValueError: If there is no such GPU.
    """
    device = choose_device(device_index)
    name = precision or ("float32" if device.type == "cpu" else "float16")
    pipe = NOVAPipeline.from_pretrained(folder, dtype=getattr(torch, name))
    return pipe.to(device)


def choose_device(index: int) -> torch.device:
    """The GPU of that index: CUDA, else Apple's only one; the CPU if there is none."""
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {index}: there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def model_name(model: str) -> str:
    """Name of a model for the files it draws: without the path, which is nobody's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def read_defaults(folder: Path, fallback: Defaults, ranges: Ranges) -> Defaults:
    """What the model's card recommends.

    The card is the README.md of the model's folder or, for a training checkpoint, of its base
    folder. As on the Hub, its header holds values under ``inference: parameters:``, by the names
    of the pipeline's arguments, and prompts under ``widget:``, each a ``text``. Values that the
    sliders cannot show are reported and left out.

    Args:
        folder: Of the model.
        fallback: Where the card says nothing.
        ranges: Of the sliders.

    Raises:
        ValueError: If the card's header cannot be read.
    """
    card = find_card(folder)
    if card is None:
        return fallback
    try:
        header = ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the header of {card} cannot be read: {error}") from error
    recommended: dict[str, Any] = {}
    for name, value in read_mapping(read_mapping(header, "inference"), "parameters").items():
        limits = getattr(ranges, name, None)
        if name == "negative_prompt" and isinstance(value, str):
            recommended[name] = value
        elif limits is not None and is_number_within(value, limits):
            recommended[name] = value
        elif limits is not None:
            logger.warning("%s: %s is %r, not %g to %g", card, name, value, *limits)
    examples = read_examples(header)
    if examples:
        recommended["examples"] = examples
    return replace(fallback, **recommended)


def find_card(folder: Path) -> Path | None:
    """README.md of a model's folder, or of the folder that a checkpoint belongs to."""
    base, _ = read_base_reference(folder)
    candidates = [own_path(parent, "README.md") for parent in (folder, base) if parent is not None]
    return next((path for path in candidates if path.is_file()), None)


def read_mapping(header: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping of the header; cards may have other things, such as ``inference: false``."""
    value = header.get(name)
    return value if isinstance(value, dict) else {}


def read_examples(header: dict[str, Any]) -> tuple[str, ...]:
    """The prompts of the card's ``widget``."""
    widget = header.get("widget")
    entries = widget if isinstance(widget, list) else []
    texts = [entry.get("text") for entry in entries if isinstance(entry, dict)]
    return tuple(text for text in texts if isinstance(text, str))


def is_number_within(value: Any, limits: tuple[float, float]) -> bool:
    """Whether a slider can show the value."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and limits[0] <= value <= limits[1]
