"""What a model's card says about using it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from diffnext.utils.component_files import own_path, read_base_reference

__all__ = ["Defaults", "Ranges", "read_defaults"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Least and greatest values that may be recommended."""

    guidance_scale: tuple[float, float] = (1, 10)
    num_inference_steps: tuple[int, int] = (1, 128)
    num_diffusion_steps: tuple[int, int] = (1, 50)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What is drawn with when nobody says otherwise.

    Attributes:
        guidance_scale: Weight of the prompt.
        num_inference_steps: Sets of tokens per frame.
        num_diffusion_steps: Denoising steps per set.
        negative_prompt: What to avoid.
        examples: Prompts to choose from.
    """

    guidance_scale: float
    num_inference_steps: int
    num_diffusion_steps: int
    negative_prompt: str
    examples: tuple[str, ...] = ()


def read_defaults(folder: Path, fallback: Defaults, ranges: Ranges) -> Defaults:
    """What the model's card recommends.

    The card is the README.md of the model's folder or, for a training checkpoint, of its base
    folder. As on the Hub, its header holds values under ``inference: parameters:``, by the names
    of the pipeline's arguments, and prompts under ``widget:``, each a ``text``. Values out of range
    are reported and left out.

    Args:
        folder: Of the model.
        fallback: Where the card says nothing.
        ranges: Of the values.

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
    """Whether a value is a number of a range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and limits[0] <= value <= limits[1]
