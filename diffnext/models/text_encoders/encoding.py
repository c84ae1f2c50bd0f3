"""Text states: prompts as a text encoder returns them.

Shapes: n tokens of a text, D width of the states.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffnext.models.modeling_utils import evaluating
from diffnext.utils.component_files import reading
from diffnext.utils.host_data import send

MOST_TOKENS = 10**6  # counted; models read 256
# A fast tokenizer holds the truncation of a call, and lets one thread change it at a time.
_TOKENIZER_LOCK = threading.Lock()


def encode_texts(
    tokenizer: Any,
    text_encoder: Any,
    texts: Sequence[str],
    max_tokens: int,
    width: int,
) -> list[Tensor]:
    """Encode texts in one batch, each different one once; safe to call from several threads.

    The encoder runs in evaluation mode and in its own type, without autocast.

    Args:
        tokenizer: Callable that returns ``input_ids``.
        text_encoder: Causal encoder that returns ``last_hidden_state``.
        texts: At least one.
        max_tokens: Longer texts are cut.
        width: D.

    Returns:
        States of the real tokens of each text, (n, D), in the type of the encoder; n is 0 for a
        text without tokens.

    Raises:
        TypeError: If a text is not a string.
        ValueError: If a text is not Unicode, there is no tokenizer or encoder, or the tokenizer
            gives too many tokens, or tokens that the encoder does not have.
    """
    if tokenizer is None or text_encoder is None:
        raise ValueError(
            "prompts given as text need a tokenizer and a text encoder, and one is missing: load "
            "the pipeline with both, or pass prompt_embeds"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {index} must be a string, got {type(text).__name__}: {text!r}")
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise ValueError(f"prompt {index} is not Unicode text: {text!r}")
    unique = list(dict.fromkeys(texts))
    ids = tokenize(tokenizer, unique, max_tokens, text_encoder.config.vocab_size)
    longest = max(len(row) for row in ids)
    device = text_encoder.device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: hooks move it
    if longest == 0:
        return [torch.empty(0, width, device=device, dtype=text_encoder.dtype) for _ in texts]
    # The encoder is causal: padding after a prompt does not reach its states.
    padding = tokenizer.pad_token_id or 0
    padded = [list(row) + [padding] * (longest - len(row)) for row in ids]
    input_ids = send(torch.tensor(padded, dtype=torch.int64), device)
    with evaluating(text_encoder), torch.autocast(device.type, enabled=False):
        states = text_encoder(input_ids).last_hidden_state
    found = {text: state[: len(row)] for text, state, row in zip(unique, states, ids, strict=True)}
    return [found[text] for text in texts]


def count_tokens(tokenizer: Any, text: str, text_encoder: Any) -> int:
    """Tokens of a text that is not cut.

    Raises:
        ValueError: As :func:`tokenize`.
    """
    return len(tokenize(tokenizer, [text], MOST_TOKENS, text_encoder.config.vocab_size)[0])


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, vocabulary: int
) -> list[list[int]]:
    """Token ids of texts; a fast tokenizer is left as it was.

    Args:
        tokenizer: Callable that returns ``input_ids``.
        texts: At least one.
        max_tokens: Longer texts are cut.
        vocabulary: Number of different tokens that the text encoder has.

    Raises:
        ValueError: If the tokenizer gives too many tokens, or tokens outside the vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    with _TOKENIZER_LOCK:
        truncation = None if backend is None else backend.truncation
        name = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
        with reading(name, "a tokenizer"):
            ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        if backend is not None:
            backend.no_truncation()
            if truncation is not None:
                backend.enable_truncation(**truncation)
    for text, row in zip(texts, ids, strict=True):
        if len(row) > max_tokens or max(row, default=0) >= vocabulary:
            raise ValueError(
                f"the tokenizer must give at most {max_tokens} tokens, below {vocabulary}, which "
                f"the text encoder has; it gave {list(row)} for {text!r}"
            )
    return ids
