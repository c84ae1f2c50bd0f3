"""Text states: what a text encoder makes of prompts.

Shapes: n tokens of a text, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_texts(
    tokenizer: Any,
    text_encoder: Any,
    texts: Sequence[str],
    max_tokens: int,
    width: int,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Encode texts in one batch, each different one once.

    Args:
        tokenizer: Callable that returns ``input_ids``.
        text_encoder: Causal encoder that returns ``last_hidden_state``.
        texts: At least one.
        max_tokens: Tokens of a text that are encoded at most.
        width: D.
        device: Of the input; default: the encoder's.

    Returns:
        States of the real tokens of each text, (n, D); n is 0 for a text without tokens.
    """
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(unique, truncation=True, max_length=max_tokens)["input_ids"]
    longest = max(len(row) for row in ids)
    device = text_encoder.device if device is None else device
    if longest == 0:
        return [torch.empty(0, width, device=device) for _ in texts]
    # The encoder is causal: what stands behind a prompt does not reach its states.
    padding = tokenizer.pad_token_id or 0
    padded = [list(row) + [padding] * (longest - len(row)) for row in ids]
    input_ids = torch.tensor(padded, dtype=torch.int64, device=device)
    states = text_encoder(input_ids).last_hidden_state
    found = {text: state[: len(row)] for text, state, row in zip(unique, states, ids, strict=True)}
    return [found[text] for text in texts]
