"""Prompts of a benchmark: reading texts and text states, and encoding texts.

Shapes: k tokens of a prompt, d width of the text encoder.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffnext.evaluation.layouts import write_whole
from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline
from diffnext.pipelines.release_folder import find_component, read_class_name
from diffnext.utils.component_files import own_path
from diffnext.utils.folders import find_folder
from diffnext.utils.json_files import read_json

__all__ = [
    "PromptSet",
    "check_model",
    "encode_prompts",
    "prompts_of_records",
    "read_geneval",
    "read_prompts",
    "read_records",
    "read_vbench",
    "save_states",
]

STATES_SUFFIX = ".pth"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark, in its order.

    Attributes:
        prompts: What to draw: only texts, or only text states, (k, d) each.
        texts: The benchmark's own short texts, which name files; None if they are unknown.
        tags: Group of each prompt; None if there are none.
    """

    prompts: tuple[str, ...] | tuple[Tensor, ...]
    texts: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(path: str | os.PathLike, key: str = "prompt") -> PromptSet:
    """Read prompts of any form.

    Args:
        path: A ``.json`` file with a list of objects or a ``.jsonl`` file with an object per line,
            see :func:`prompts_of_records`, or a ``.pth`` file with ``{"prompts": [states, ...],
            "texts": [...], "tags": [...]}``, of which the last two may be absent.
        key: Name of the text to draw; has no effect on text states.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    path = Path(path).expanduser()
    if path.suffix == STATES_SUFFIX:
        return _read_states(path)
    return prompts_of_records(read_records(path), path, key)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of the lines of a ``.jsonl`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or holds anything but objects, or none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list with at least one prompt")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: prompt {index} must be an object, got {record!r}")
    return records


def prompts_of_records(
    records: Sequence[dict[str, Any]], path: str | os.PathLike, key: str = "prompt"
) -> PromptSet:
    """Prompts of objects with ``prompt`` and perhaps ``dense_prompt`` and ``tag``.

    Args:
        records: The objects. Where all have a string under ``tag``, it is kept.
        path: Their file, for messages.
        key: Name of the text to draw.

    Raises:
        ValueError: If a text is missing or cannot be written in UTF-8.
    """

    def column(name: str) -> tuple[str, ...]:
        return tuple(_text(record, name, index, path) for index, record in enumerate(records))

    has_tags = all(isinstance(record.get("tag"), str) for record in records)
    return PromptSet(column(key), column("prompt"), column("tag") if has_tags else None)


def _text(record: dict[str, Any], key: str, index: int, path: str | os.PathLike) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{path}: prompt {index} must have a text {key!r}, got {text!r}")
    return _checked_text(text, index, path)


def _checked_text(text: str, index: int, path: str | os.PathLike) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: prompt {index} is not Unicode text: {text!r}") from None
    return text


def _read_states(path: Path) -> PromptSet:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} holds more than tensors, or is damaged: {reason}") from None
    states = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(states, (list, tuple)) or not states:
        raise ValueError(f"{path} must hold a list of text states under 'prompts'")
    for index, state in enumerate(states):
        if not isinstance(state, Tensor) or state.ndim != 2 or not state.is_floating_point():
            what = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"{path}: the states of prompt {index} must be floating point (k, d), got {what}"
            )
    texts, tags = (_names(content.get(name), name, len(states), path) for name in ("texts", "tags"))
    return PromptSet(tuple(states), texts, tags)


def _names(names: Any, what: str, count: int, path: Path) -> tuple[str, ...] | None:
    """One name per prompt; old files may hold each name twice, one after the other."""
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {what!r} must be a list of texts")
    if len(names) == 2 * count and names[::2] == names[1::2]:
        names = names[::2]
    if len(names) != count:
        raise ValueError(
            f"{path}: there must be one of {what!r} per prompt, got {len(names)} for {count}"
        )
    return tuple(_checked_text(name, index, path) for index, name in enumerate(names))


def read_geneval(
    metadata: str | os.PathLike, prompt: str | os.PathLike = "", key: str = "prompt"
) -> tuple[PromptSet, list[dict[str, Any]]]:
    """Prompts for GenEval, and the benchmark's metadata.

    Args:
        metadata: The benchmark's ``evaluation_metadata.jsonl``.
        prompt: File with what is drawn, see :func:`read_prompts`; empty for the metadata's prompts.
        key: Name of the text to draw.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the two files are not about the same prompts.
    """
    records = read_records(metadata)
    if not prompt:
        return prompts_of_records(records, metadata, key), records
    own_texts = prompts_of_records(records, metadata).texts or ()
    prompts = read_prompts(prompt, key)
    if len(prompts) != len(records):
        raise ValueError(f"{prompt} has {len(prompts)} prompts, {metadata} has {len(records)}")
    for index, (text, wanted) in enumerate(zip(prompts.texts or own_texts, own_texts, strict=True)):
        if text != wanted:
            raise ValueError(f"prompt {index} is {text!r} in {prompt}, {wanted!r} in {metadata}")
    return prompts, records


def read_vbench(prompt: str | os.PathLike, key: str = "prompt") -> PromptSet:
    """Prompts for VBench, with texts and tags.

    Args:
        prompt: File, see :func:`read_prompts`.
        key: Name of the text to draw.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it does not name files and folders.
    """
    prompts = read_prompts(prompt, key)
    for name in ("texts", "tags"):
        if getattr(prompts, name) is None:
            raise ValueError(f"{prompt} has no {name}, which name the videos of VBench")
    return prompts


def save_states(path: str | os.PathLike, prompts: PromptSet) -> None:
    """Write text states, with texts and tags if they are known; the file appears when complete.

    Args:
        path: A ``.pth`` file.
        prompts: With text states.
    """
    states = [state.clone() for state in prompts.prompts if isinstance(state, Tensor)]
    content: dict[str, Any] = {"prompts": states}
    if prompts.tags is not None:
        content["tags"] = list(prompts.tags)
    if prompts.texts is not None:
        content["texts"] = list(prompts.texts)
    write_whole(Path(path), lambda partial: torch.save(content, partial))


def check_model(model: str | os.PathLike) -> int:
    """Check that a model draws prompts; returns the length its prompts are cut to, in tokens.

    Args:
        model: Release folder, checkpoint or Hub id.

    Raises:
        FileNotFoundError: If it or its transformer is missing.
        ValueError: If it draws something else, such as classes.
    """
    folder = find_folder(model)
    name = read_class_name(folder)
    if name != NOVAPipeline.__name__:
        raise ValueError(f"{model} is a {name}: prompts need a {NOVAPipeline.__name__}")
    place = find_component(folder, "transformer")
    if place is None:
        raise FileNotFoundError(f"{folder} has no transformer")
    file = own_path(place, "config.json")
    length = read_json(file).get("text_token_len")
    if not isinstance(length, int):
        raise ValueError(f"{file}: text_token_len must be a whole number, got {length!r:.80}")
    return length


def encode_prompts(
    model: str | os.PathLike,
    prompts: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Text states of prompts, encoded one by one, so none depends on its neighbours.

    Args:
        model: Release folder, checkpoint or Hub id; its tokenizer and text encoder are loaded.
        prompts: Texts; those longer than the model reads are cut.
        device: Where to encode.
        dtype: Type of the text encoder and its states.

    Yields:
        (k, d) on the CPU; k is 0 for an empty text.

    Raises:
        ValueError: If the model has no text encoder.
    """
    max_length = check_model(model)
    pipe = NOVAPipeline.from_pretrained(
        model, dtype=dtype, transformer=None, vae=None, scheduler=None
    ).to(device)
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError(f"{model} has no text encoder: give it prompts that are encoded already")
    for prompt in prompts:
        yield _encode(pipe, prompt, max_length)


@torch.no_grad()
def _encode(pipe: NOVAPipeline, prompt: str, max_length: int) -> Tensor:
    """States of one prompt, (n, D)."""
    encoder = pipe.text_encoder
    width = encoder.config.hidden_size
    states = encode_texts(pipe.tokenizer, encoder, [prompt], max_length, width)[0]
    return states.to("cpu", encoder.dtype)
