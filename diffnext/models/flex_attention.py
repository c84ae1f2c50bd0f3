"""Block-causal attention on PyTorch's FlexAttention kernels.

Shapes: B batch, H heads, L tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["FlexAttentionCausal2D"]


@dataclass(frozen=True)
class Segments:
    """Runs of tokens.

    Attributes:
        offsets: Where they begin and end, ascending from 0.
        flags: Whether each is bidirectional inside; all are when None, missing ones are not.
    """

    offsets: tuple[int, ...] = ()
    flags: tuple[bool, ...] | None = None


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """PyTorch's flex attention, compiled; one function, which holds no tensors, for all layers."""
    return torch.compile(flex_attention)


class FlexAttentionCausal2D(nn.Module):
    """Causal attention that is bidirectional inside each segment of tokens.

    Without flags every segment is bidirectional inside; with flags only those whose flag is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments = Segments()

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where segments begin and end; empty before they are set."""
        return self.segments.offsets

    def set_offsets(self, offsets: Sequence[int], flags: Sequence[bool] | None = None) -> None:
        """Set where segments begin and end.

        Args:
            offsets: Ascending ends of the segments; a leading 0 is added when missing.
            flags: Whether each segment is bidirectional inside; missing ones are false.
        """
        offsets = tuple(offsets)
        offsets = offsets if offsets[:1] == (0,) else (0, *offsets)
        self.segments = Segments(offsets, None if flags is None else tuple(flags))

    def set_offsets_by_lens(self, lens: Sequence[int], flags: Sequence[bool] | None = None) -> None:
        """Set segments by their lengths."""
        self.set_offsets([0, *accumulate(lens)], flags)

    def get_mask_mod(self, device: torch.device | str | None = None) -> Callable[..., Tensor]:
        """The visibility rule in FlexAttention's form, (b, h, q, k) -> bool."""
        lengths = torch.tensor(self.offsets, device=device).diff()
        count = len(lengths)
        segment = torch.arange(count, device=device).repeat_interleave(lengths)
        given = (True,) * count if self.segments.flags is None else self.segments.flags
        flags = [*given, *[False] * count]
        is_open = torch.tensor(flags[:count], device=device)[segment]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) | ((segment[q] == segment[k]) & is_open[q])

        return mask_mod

    def get_attn_func(self) -> Callable[..., Tensor]:
        """PyTorch's flex attention, compiled."""
        return compiled_flex_attention()

    def get_block_mask(self, q: Tensor) -> BlockMask:
        """The block mask for queries (B, H, L, d), built anew.

        Raises:
            ValueError: If no segments are set, or they do not cover the queries.
        """
        return self.make_block_mask(q.size(2), q.device)

    def make_block_mask(self, length: int, device: torch.device) -> BlockMask:
        """As :meth:`get_block_mask`, for this many queries."""
        if not self.offsets or self.offsets[-1] != length:
            raise ValueError(
                f"segments end at {list(self.offsets[-1:])}, but there are {length} tokens"
            )
        mask_mod = self.get_mask_mod(device)
        return create_block_mask(mask_mod, None, None, length, length, device=device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all of (B, H, L, d)."""
        return self.get_attn_func()(q, k, v, block_mask=self.get_block_mask(q))
