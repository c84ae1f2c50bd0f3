"""The transformer of both encoders: post-norm blocks, optional condition and known tokens.

Shapes: B batch, N tokens of the frame, k known tokens, Lc condition tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffnext.models.attention import (
    AttentionMask,
    BlockCausalMask,
    LayerKVCache,
    PaddingMask,
    attend,
)
from diffnext.models.compilation import compile_static, pad_length, pad_tokens
from diffnext.models.embeddings import (
    PatchEmbed,
    PosEmbed,
    PositionFunction,
    RotaryEmbed3D,
    RotationTables,
    gather_tokens,
    scatter_tokens,
)
from diffnext.models.flex_attention import FlexAttentionCausal2D

__all__ = ["MLP", "Attention", "Block", "Projector", "VisionTransformer", "set_checkpointing"]


def run_checkpointed(enabled: bool, fn: Callable[..., Any], *args: Any) -> Any:
    """Call ``fn``; when enabled, drop its activations and recompute them in backward."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False)
    return fn(*args)


def set_checkpointing(blocks: Iterable[nn.Module], enabled: bool) -> None:
    """Switch the activation checkpointing of the blocks' MLPs on or off."""
    for block in blocks:
        vars(block)["mlp_checkpointing"] = enabled


class Projector(nn.Module):
    """Two-layer perceptron with SiLU.

    Args:
        dim: Input width.
        mlp_dim: Hidden width; ``dim`` when None.
        out_dim: Output width; ``dim`` when None.
    """

    def __init__(self, dim: int, mlp_dim: int | None = None, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim or dim)
        self.fc2 = nn.Linear(mlp_dim or dim, out_dim or dim)
        self.activation: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., out_dim)."""
        return self.fc2(self.activation(self.fc1(x)))

    def layers(self) -> tuple[nn.Module, ...]:
        """What :meth:`forward` calls, in order."""
        return self.fc1, self.activation, self.fc2


class MLP(Projector):
    """Two-layer perceptron with GELU, from tokens to tokens.

    Args:
        dim: Token width.
        mlp_ratio: Hidden width over token width.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4) -> None:
        super().__init__(dim, int(dim * mlp_ratio))
        self.activation = nn.GELU()


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: Token width D.
        num_heads: Number of heads H.
        qkv_bias: Whether queries, keys and values have a bias.

    Raises:
        ValueError: If the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"the width {dim} is not a multiple of the number of heads {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        pe_func: PositionFunction | None = None,
        mask: AttentionMask | None = None,
        cache: LayerKVCache | None = None,
        out_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens, (B, L, D).
            pe_func: Turns queries and keys (B, H, L, d) by position.
            mask: Causality between blocks; everything is visible when None.
            cache: Earlier tokens to look at as well; the new ones are added to it.
            out_ids: Tokens that attend, (B, n, 1); all when None. Not with ``mask``.

        Returns:
            (B, L, D), or (B, n, D).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
        q, k, v = qkv
        if isinstance(pe_func, RotationTables):
            q, k = pe_func(qkv[:2])  # both at once
        elif pe_func is not None:
            q, k = pe_func(q), pe_func(k)
        if cache is not None:
            k, v = cache.append(k, v)
        if out_ids is not None:
            ids = out_ids.unsqueeze(1)  # (B, 1, n, 1)
            q = q.gather(2, ids.expand(-1, self.num_heads, -1, self.head_dim))
        attended = attend(q, k, v) if mask is None else mask.attend(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block with the norm at the end of each residual branch (arXiv:2111.09883).

    Args:
        dim: Token width.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLP over token width.
        qkv_bias: Whether queries, keys and values have a bias.

    Attributes:
        attn_checkpointing: Recompute the attention branch in backward.
        mlp_checkpointing: Recompute the MLP branch in backward.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.attn_checkpointing = False
        self.mlp_checkpointing = False
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio=mlp_ratio)

    def forward(
        self,
        x: Tensor,
        pe_func: PositionFunction | None = None,
        mask: AttentionMask | None = None,
        cache: LayerKVCache | None = None,
        out_ids: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to tokens; arguments as for :class:`Attention`."""
        branch = run_checkpointed(
            self.attn_checkpointing, self._attention_branch, x, pe_func, mask, cache, out_ids
        )
        x = branch + (x if out_ids is None else gather_tokens(x, out_ids))
        return x + run_checkpointed(self.mlp_checkpointing, self._mlp_branch, x)

    def _attention_branch(self, *inputs: Any) -> Tensor:
        return self.norm1(self.attn(*inputs))

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))


class VisionTransformer(nn.Module):
    """Encoder of frames; with known tokens, its first blocks see only those (MAE-like).

    Args:
        depth: Number of blocks.
        embed_dim: Token width D.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLPs over token width.
        patch_size: Side of a patch.
        image_size: Latent size (height, width), or a side; informative.
        image_dim: Latent channels.
        encoder_depth: Blocks that see only known tokens; half of all when None.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4,
        patch_size: int = 2,
        image_size: int | Sequence[int] = 32,
        image_dim: int = 4,
        encoder_depth: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.image_dim = image_dim
        self.encoder_depth = depth // 2 if encoder_depth is None else encoder_depth
        self.patch_embed = PatchEmbed(image_dim, embed_dim, patch_size)
        self.pos_embed: nn.Module = nn.Identity()
        self.rope = RotaryEmbed3D(embed_dim // num_heads)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.mixer = nn.Identity()
        self.flex_attn = FlexAttentionCausal2D()
        self._compiled_block: Callable[..., Tensor] | None = None
        self._training_block: Callable[..., Tensor] | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether compiled blocks run now; they need few different numbers of tokens."""
        return self._compiled_block is not None and not torch.is_grad_enabled()

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks for inference without a cache; options of ``torch.compile``."""
        self._compiled_block = compile_static(Block.forward, **options)

    def compile_training(self, **options: Any) -> None:
        """Compile the blocks for when gradients are recorded; options of ``torch.compile``."""
        self._training_block = torch.compile(Block.__call__, **options)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents the model is built for."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.image_dim, height, width

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        c: Tensor | None = None,
        prev_ids: Tensor | None = None,
        pos: Tensor | RotationTables | None = None,
        mask: BlockCausalMask | None = None,
        cache: Sequence[LayerKVCache] | None = None,
        out_ids: Tensor | None = None,
        table: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Encode one frame, or several laid end to end.

        Args:
            x: Latents (B, C, h, w) or tokens (B, N, D); a pair also carries ``prev_ids``.
            c: Condition tokens put in front, (B, Lc, D).
            prev_ids: Known tokens, (B, k, 1), k may be 0. The first ``encoder_depth`` blocks see
                only these and the condition; the rest see all.
            pos: Rotary positions (B or 1, N, 3), or their :meth:`rotation`; none are applied when
                None.
            mask: Causality between frames.
            cache: Keys and values of earlier frames, by layer, filled on the way.
            out_ids: Tokens to return, (B, n, 1); the last block then works only on those. All when
                None, which ``mask`` needs.
            table: What ``pos_embed`` adds to the tokens, (N, D), from callers who keep it.
            visible: Which condition and known tokens are real, (1, Lc + k), where ``prev_ids`` end
                with repetitions of the last one; all when None.

        Returns:
            (B, N, D), or (B, n, D).
        """
        if isinstance(x, tuple):
            x, prev_ids = x
        tokens: Tensor = self.patch_embed(x)
        tokens = self.pos_embed(tokens) if table is None else tokens + table
        c = tokens[:, :0] if c is None else c
        num_condition = c.size(1)
        if isinstance(pos, Tensor):
            pos = self.rotation(pos, num_condition, tokens.dtype)
        if mask is not None:
            mask = mask.prepare(tokens.device, self.rope.dim)
        start = 0
        x = tokens
        if prev_ids is not None and self.encoder_depth > 0:
            known_pos = None if pos is None else pos.select(prev_ids, num_condition)
            known = torch.cat([c, gather_tokens(tokens, prev_ids)], dim=1)  # (B, Lc + k, D)
            start = self.encoder_depth
            length = known.size(1)
            known_mask: AttentionMask | None = mask if visible is None else PaddingMask(visible)
            if self.is_compiled and visible is None:
                padding = pad_length(length, num_condition + tokens.size(1)) - length
                places = torch.arange(length + padding, device=known.device)
                known_mask = PaddingMask(places[None] < length)
                known = F.pad(known, (0, 0, 0, padding))
                known_pos = None if known_pos is None else known_pos.pad(padding)
            known = self._run_blocks(known, 0, start, known_pos, known_mask, cache)
            c, known = known[:, :num_condition], known[:, num_condition:length]
            x = scatter_tokens(tokens.to(known.dtype), prev_ids, known)
        x = torch.cat([c, x], dim=1)
        end = len(self.blocks)
        if out_ids is None:
            x = self._run_blocks(x, start, end, pos, mask, cache)
            return self.norm(x[:, num_condition:])
        wanted = out_ids + num_condition
        wanted = pad_tokens(wanted) if self.is_compiled else wanted
        x = self._run_blocks(x, start, end, pos, mask, cache, wanted)
        x = gather_tokens(x, wanted) if start == end else x
        return self.norm(x[:, : out_ids.size(1)])

    def position_table(self, tokens: Tensor) -> Tensor | None:
        """What ``pos_embed`` adds to tokens (B, N, D): (N, D), or None if it is not a table."""
        return self.pos_embed.table_for(tokens) if isinstance(self.pos_embed, PosEmbed) else None

    def rotation(self, pos: Tensor, num_condition: int, dtype: torch.dtype) -> RotationTables:
        """The rotation of condition tokens, at position 0, and tokens at ``pos`` (B or 1, N, 3)."""
        return self.rope.get_func(pos, pad=num_condition).to(dtype)

    def _run_blocks(
        self,
        x: Tensor,
        start: int,
        end: int,
        pe_func: RotationTables | None,
        mask: AttentionMask | None,
        cache: Sequence[LayerKVCache] | None,
        out_ids: Tensor | None = None,
    ) -> Tensor:
        compiled = self._training_block if torch.is_grad_enabled() else self._compiled_block
        run = Block.__call__ if compiled is None else compiled
        for index in range(start, end):
            layer_cache = None if cache is None else cache[index]
            wanted = out_ids if index == len(self.blocks) - 1 else None
            x = run(self.blocks[index], x, pe_func, mask, layer_cache, wanted)
        return x
