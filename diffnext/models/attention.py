"""What attention may look at: causal blocks of frames, and earlier frames kept in a cache.

Shapes: B batch, H heads, L tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from diffnext.models.flex_attention import attend_flex, make_block_mask

__all__ = [
    "AttentionMask",
    "BlockCausalMask",
    "LayerKVCache",
    "PaddingMask",
    "attend",
]

MOST_EXPLICIT_KEYS = 512  # where both ways take equally long, with 16 heads, 64 wide


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of everything to everything.

    Args:
        q: Queries, (B, H, n, d).
        k: Keys, (B, H, L, d).
        v: Values, same shape.

    Returns:
        (B, H, n, d).
    """
    if _is_explicit_better(q, k):
        return ((q * q.size(-1) ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _is_explicit_better(q: Tensor, k: Tensor) -> bool:
    """Whether two products and a softmax beat PyTorch's fused kernel.

    They do on a CPU when gradients are needed, for short sequences in bfloat16, as the kernel's
    backward takes up to seven times as long (its forward does not), and when compiled, as that
    backward rejects shapes that change (PyTorch 2.13).
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    is_short = q.dtype == torch.bfloat16 and q.requires_grad and k.size(2) <= MOST_EXPLICIT_KEYS
    return is_short or torch.compiler.is_compiling()


@dataclass(frozen=True)
class PaddingMask:
    """Hides the padding after the real keys, so there are few different lengths.

    Attributes:
        visible: Which keys are real, (1, L).
    """

    visible: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Masked attention: (B, H, n, d) queries, (B, H, L, d) keys and values."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)


@dataclass(frozen=True)
class BlockCausalMask:
    """Tokens see their own block and every earlier one: bidirectional inside a frame, causal over.

    Attributes:
        lengths: Tokens of each block, in order.
        block_mask: The same for FlexAttention's kernels; see :meth:`prepare`.
    """

    lengths: tuple[int, ...]
    block_mask: BlockMask | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_frames(cls, num_frames: int, frame_tokens: int, num_condition: int) -> BlockCausalMask:
        """One block per frame; the condition tokens in front belong to the first."""
        first = num_condition + frame_tokens
        return cls(lengths=(first,) + (frame_tokens,) * (num_frames - 1))

    def prepare(self, device: torch.device, head_dim: int) -> BlockCausalMask:
        """This mask, ready for the fastest attention of a device; layers may share it.

        On CUDA one FlexAttention kernel skips the hidden blocks, for heads of the widths it takes.
        """
        if not can_flex(device, head_dim):
            return self
        offsets = (0, *accumulate(self.lengths))
        return replace(self, block_mask=make_block_mask(offsets, None, device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Masked attention without a dense mask, at about half of the products.

        Unprepared, each block attends to its own prefix of the keys. The results are equal up to
        rounding.

        Args:
            q: Queries, (B, H, L, d), L the sum of ``lengths``.
            k: Keys, same shape.
            v: Values, same shape.

        Returns:
            (B, H, L, d).

        Raises:
            ValueError: If the token counts differ.
        """
        if q.size(2) != sum(self.lengths) or k.size(2) != q.size(2):
            raise ValueError(
                f"blocks of {self.lengths} tokens do not cover {q.size(2)} queries and "
                f"{k.size(2)} keys"
            )
        if self.block_mask is not None:
            return attend_flex(q, k, v, self.block_mask)
        ends = accumulate(self.lengths)
        outputs = [
            attend(queries, k[:, :, :end], v[:, :, :end])
            for queries, end in zip(q.split(self.lengths, dim=2), ends, strict=True)
        ]
        return torch.cat(outputs, dim=2)

    def dense(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """The additive mask (L, L): 0 where a query may look, -inf elsewhere."""
        lengths = torch.tensor(self.lengths, device=device)
        block = torch.arange(len(self.lengths), device=device).repeat_interleave(lengths)
        visible = block[:, None] >= block[None, :]
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(
            ~visible, float("-inf")
        )


AttentionMask = PaddingMask | BlockCausalMask  # what tokens may look at


def can_flex(device: torch.device, head_dim: int) -> bool:
    """Whether FlexAttention has a kernel for heads of this width, and it can be compiled."""
    if device.type != "cuda" or find_spec("triton") is None or torch._dynamo.config.disable:
        return False
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0  # a power of two


class LayerKVCache:
    """Keys and values of one layer: what came first, and as many of the latest frames as fit.

    When there is no room, a frame overwrites the oldest one. What was appended first, the prompt
    with the first frame, always stays.

    Args:
        buffer: Uninitialised storage, (2, B, H, capacity, d).
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.length = 0
        self._next = 0  # where the next tokens go
        self._first = 0  # how many tokens came first
        self._first_keys: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens and return everything held.

        Args:
            k: New keys (B, H, L, d), positions already applied.
            v: New values, same shape.

        Returns:
            All keys and values that are held, (B, H, length, d), in any order.

        Raises:
            ValueError: If the tokens do not fit beside those that came first.
        """
        capacity = self.buffer.size(3)
        start = self._next if self._next + k.size(2) <= capacity else self._first
        end = start + k.size(2)
        if end > capacity:
            raise ValueError(f"the key/value cache holds {capacity} tokens, {end} needed")
        self.buffer[0, :, :, start:end] = k
        self.buffer[1, :, :, start:end] = v
        self._first = self._first or end
        self._next, self.length = end, max(self.length, end)
        keys, values = self.buffer[:, :, :, : self.length]
        return keys, values

    def turn_first(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Move the keys that came first to another position.

        Args:
            turn: Applied to them as they were appended, (B, H, L, d).
        """
        first = self.buffer[0, :, :, : self._first]
        if self._first_keys is None:
            self._first_keys = first.clone()
        first.copy_(turn(self._first_keys))
