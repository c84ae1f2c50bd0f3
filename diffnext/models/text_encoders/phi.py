"""The Phi language model as a text encoder: its last hidden states.

Shapes: B batch, S tokens, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.phi.modeling_phi import (
    PhiAttention,
    PhiMLP,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.models.phi.modeling_phi import PhiDecoderLayer as PhiLayer
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding as PhiCache

from diffnext.models.modeling_utils import load_strictly

__all__ = [
    "PhiAttention",
    "PhiCache",
    "PhiEncoderModel",
    "PhiFlashAttention2",
    "PhiLayer",
    "PhiMLP",
    "PhiModel",
    "PhiPreTrainedModel",
    "apply_rotary_emb",
    "apply_rotary_emb_torch",
    "rotate_half",
]

# The original's name; transformers chooses attention kernels by itself.
PhiFlashAttention2 = PhiAttention


def apply_rotary_emb(*inputs: Tensor) -> Any:
    """Rotate by position, half-split, in one of two forms.

    Args:
        *inputs: Queries and keys (B, H, S, r), cosines and sines (B, S, r), as transformers has
            them; or one tensor (B, S, H, d) with cosines and sines (S, r / 2), whose channels
            after the first r stay as they are.

    Returns:
        The rotated queries and keys, or the rotated tensor.

    Source: RoFormer, arXiv:2104.09864.
    """
    if len(inputs) == 4:
        return apply_rotary_pos_emb(*inputs)
    x, *tables = inputs
    cos, sin = (torch.cat([table, table], dim=-1).unsqueeze(-2) for table in tables)  # (S, 1, r)
    turned, rest = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
    return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)


apply_rotary_emb_torch = apply_rotary_emb


class PhiPreTrainedModel(PreTrainedModel):
    """Loading and saving of Phi models; weights must fit exactly."""

    config_class = PhiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    # The language-modelling head is never used: folders without it are complete.
    _keys_to_ignore_on_load_missing = [r"^lm_head\."]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model folder, sharded or not.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: As for transformers' method.
            **kwargs: As for transformers' method.

        Raises:
            RuntimeError: If weights are missing or unknown; the message lists the keys.
        """
        return load_strictly(
            super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs
        )


class PhiEncoderModel(PhiPreTrainedModel):
    """Phi without a language-modelling loss: hidden states of a prompt.

    Args:
        config: transformers' ``PhiConfig``.
    """

    def __init__(self, config: PhiConfig) -> None:
        super().__init__(config)
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode tokens, padded on the right.

        Args:
            input_ids: (B, S).
            attention_mask: Ignored: attention is causal, so padding reaches no real token.
            inputs_embeds: Token embeddings (B, S, d) instead of ids.
            **kwargs: Ignored.

        Returns:
            ``last_hidden_state`` (B, S, d), after the final norm.
        """
        outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)
        return BaseModelOutput(last_hidden_state=outputs.last_hidden_state)
