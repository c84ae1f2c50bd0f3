"""Block-causal attention on PyTorch's FlexAttention kernels.

Shapes: B batch, H heads, L tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from diffnext.models.compilation import compile_static
from diffnext.utils.host_data import send

__all__ = ["FlexAttentionCausal2D", "attend_flex", "make_block_mask"]

BLOCK_SIZE = 128  # tokens, of queries and of keys; PyTorch's own choice


def visible_ends(offsets: Sequence[int], flags: Sequence[bool] | None) -> Tensor:
    """How many of all tokens, counted from the first, each one sees; (L,), ascending.

    Args:
        offsets: Where the segments begin and end, ascending from 0.
        flags: Whether each is bidirectional inside; all are when None, missing ones are not.
    """
    spans = list(pairwise(offsets))
    flags = (True,) * len(spans) if flags is None else flags
    ends = torch.arange(1, offsets[-1] + 1 if offsets else 1)
    for (begin, end), is_open in zip(spans, flags, strict=False):
        if is_open:
            ends[begin:end] = end
    return ends


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """PyTorch's flex attention, compiled; one function, which holds no tensors, for all layers.

    If it cannot be compiled, that is an error: eager, it holds a dense table of scores per head.
    """
    return compile_static(cast("Callable[..., Tensor]", flex_attention), fullgraph=True)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """Flex attention as one kernel, of its own or in the graph that is being compiled."""
    if torch.compiler.is_compiling():
        return cast(Tensor, flex_attention(q, k, v, block_mask=block_mask))
    return compiled_flex_attention()(q, k, v, block_mask=block_mask)


@lru_cache(maxsize=32)  # few layouts occur in a run, each in every step
@torch.inference_mode(False)  # as it may be used in training later
def make_block_mask(
    offsets: tuple[int, ...], flags: tuple[bool, ...] | None, device: torch.device
) -> BlockMask:
    """The block mask of some segments, without a dense table of tokens by tokens.

    Args:
        offsets: As for :func:`visible_ends`.
        flags: The same.
        device: Where it is used.
    """
    ends = visible_ends(offsets, flags)
    length = len(ends)
    first = torch.arange(0, length, BLOCK_SIZE)  # query of each block of queries
    last = (first + BLOCK_SIZE - 1).clamp(max=length - 1)
    places = torch.arange(len(first))
    is_whole = first + BLOCK_SIZE <= length
    num_full = ends[first] // BLOCK_SIZE * is_whole  # blocks of keys that all queries of one see
    num_seen = -(-ends[last] // BLOCK_SIZE)
    partial = (num_full[:, None] + places) % len(places)  # the first num_seen - num_full count

    def place(x: Tensor) -> Tensor:
        return send(x[None, None].int().contiguous(), device)  # for all samples and heads

    return BlockMask.from_kv_blocks(
        place(num_seen - num_full),
        place(partial),
        place(num_full),
        place(places.expand_as(partial)),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=make_mask_mod(send(ends, device)),
        seq_lengths=(length, length),
    )


def make_mask_mod(ends: Tensor) -> Callable[..., Tensor]:
    """The visibility rule in FlexAttention's form, from :func:`visible_ends`."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < ends[q]

    return mask_mod


class FlexAttentionCausal2D(nn.Module):
    """Causal attention that is bidirectional inside each segment of tokens.

    Without flags every segment is bidirectional inside; with flags only those whose flag is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offsets: tuple[int, ...] = ()
        self.flags: tuple[bool, ...] | None = None

    def set_offsets(self, offsets: Sequence[int], flags: Sequence[bool] | None = None) -> None:
        """Set where segments begin and end.

        Args:
            offsets: Ascending ends of the segments; a leading 0 is added when missing.
            flags: Whether each segment is bidirectional inside; missing ones are false.
        """
        offsets = tuple(offsets)
        self.offsets = offsets if offsets[:1] == (0,) else (0, *offsets)
        self.flags = None if flags is None else tuple(flags)

    def set_offsets_by_lens(self, lens: Sequence[int], flags: Sequence[bool] | None = None) -> None:
        """Set segments by their lengths."""
        self.set_offsets([0, *accumulate(lens)], flags)

    def get_mask_mod(self, device: torch.device | str | None = None) -> Callable[..., Tensor]:
        """The visibility rule in FlexAttention's form, (b, h, q, k) -> bool."""
        ends = visible_ends(self.offsets, self.flags)
        return make_mask_mod(ends if device is None else ends.to(device))

    def get_attn_func(self) -> Callable[..., Tensor]:
        """PyTorch's flex attention, compiled."""
        return compiled_flex_attention()

    def get_block_mask(self, q: Tensor) -> BlockMask:
        """The block mask for queries (B, H, L, d), built once for each layout and device.

        Raises:
            ValueError: If no segments are set, or they do not cover the queries.
        """
        if not self.offsets or self.offsets[-1] != q.size(2):
            raise ValueError(
                f"segments end at {list(self.offsets[-1:])}, but there are {q.size(2)} tokens"
            )
        return make_block_mask(self.offsets, self.flags, q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all of (B, H, L, d)."""
        return attend_flex(q, k, v, self.get_block_mask(q))
