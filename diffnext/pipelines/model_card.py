"""What a model's card says about using it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from diffnext.utils.component_files import own_path, read_base_reference
from diffnext.utils.messages import one_line

__all__ = ["Defaults", "Ranges", "merged_card", "read_defaults"]

logger = logging.getLogger(__name__)

MERGED_CARD = """\
---
{header}---

# {name}

A NOVA model with merged low-rank adapters ({checkpoint}).

    diffnext generate --model {name} "a prompt"

Before you share it, say what it draws, what it was trained on, and which model it started from.
"""


@dataclass(frozen=True)
class Ranges:
    """Least and greatest values that a card may recommend."""

    guidance_scale: tuple[float, float] = (1, 10)
    num_inference_steps: tuple[int, int] = (1, 128)
    num_diffusion_steps: tuple[int, int] = (1, 50)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What to draw with unless the user says otherwise; the values are NOVA's.

    Attributes:
        guidance_scale: Weight of the prompt.
        num_inference_steps: Sets of tokens per frame.
        num_diffusion_steps: Denoising steps per set.
        negative_prompt: What to avoid.
        examples: Prompts to choose from.
    """

    guidance_scale: float = 5.0
    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    negative_prompt: str = ""
    examples: tuple[str, ...] = ()


def read_defaults(folder: Path, fallback: Defaults, ranges: Ranges) -> Defaults:
    """What the model's card recommends.

    The card is the README.md of the model's folder or, for a training checkpoint, of its base
    folder. As on the Hub, its header holds values under ``inference: parameters:``, by the names
    of the pipeline's arguments, and prompts under ``widget:``, each a ``text``. Values out of range
    are ignored with a warning.

    Args:
        folder: The model's folder.
        fallback: Where the card says nothing.
        ranges: Which values are allowed.

    Raises:
        ValueError: If the card's header cannot be read.
    """
    card = find_card(folder)
    if card is None:
        return fallback
    header = read_header(card)
    parameters = read_mapping(read_mapping(header, "inference"), "parameters")
    recommended: dict[str, Any] = {"examples": read_examples(header) or fallback.examples}
    if isinstance(parameters.get("negative_prompt"), str):
        recommended["negative_prompt"] = parameters["negative_prompt"]
    for name, (least, most) in vars(ranges).items():
        value = parameters.get(name, getattr(fallback, name))
        kinds = (int,) if name.startswith("num_") else (int, float)
        if type(value) in kinds and least <= value <= most:
            recommended[name] = value
        else:
            logger.warning("%s: %s is %s, not %g to %g", card, name, one_line(value), least, most)
    return replace(fallback, **recommended)


def find_card(folder: Path) -> Path | None:
    """README.md of a model's folder, or of the folder that a checkpoint belongs to."""
    base, _ = read_base_reference(folder)
    candidates = [own_path(parent, "README.md") for parent in (folder, base) if parent is not None]
    return next((path for path in candidates if path.is_file()), None)


def read_header(card: Path) -> dict[str, Any]:
    """What stands between the dashes at the top of a card.

    Raises:
        ValueError: If it cannot be read, or repeats parts by aliases, which may grow without end.
    """
    try:
        block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8"))
        text = block[2] if block else ""
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it must not repeat parts by aliases")
        header = yaml.safe_load(text) or {}
        if not isinstance(header, dict):
            raise ValueError("it must hold key: value pairs")
    except OSError:
        raise
    except Exception as error:  # YAML's tags, as in "!!bool maybe", raise many
        reason = " ".join(str(error).split())
        raise ValueError(f"the header of {card} cannot be read: {reason}") from error
    return header


def merged_card(checkpoint: Path, name: str) -> str:
    """The card of a model that adapters were merged into.

    Args:
        checkpoint: Folder of the adapters.
        name: Of the merged model.

    Returns:
        Text of its README.md: the header of the base model's card, and a draft of the rest.

    Raises:
        ValueError: If that header cannot be read.
    """
    card = find_card(checkpoint)
    header = {"library_name": "diffusers"} if card is None else read_header(card)
    return MERGED_CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        name=name,
        checkpoint=checkpoint.name,
    )


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
