"""A diffusion transformer over whole frames; a public building block, not part of NOVA.

Shapes: B batch, N tokens of the frame, Lc condition tokens, D width, p patch size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffnext.models.embeddings import (
    PatchEmbed,
    PositionFunction,
    RotaryEmbed3D,
    timestep_features,
)
from diffnext.models.normalization import AdaLayerNormSingle, AdaLayerNormZero
from diffnext.models.vision_transformer import MLP, Attention, Projector, run_checkpointed

__all__ = ["MLP", "Attention", "Block", "DiffusionTransformer", "TimeEmbed"]

AdaptiveNorm = AdaLayerNormSingle | AdaLayerNormZero


class TimeEmbed(nn.Module):
    """Diffusion timesteps as vectors.

    Args:
        embed_dim: Width of the vectors.
        freq_dim: Width of the timestep features.
    """

    def __init__(self, embed_dim: int, freq_dim: int = 256) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.timestep_proj = Projector(freq_dim, embed_dim, embed_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (B,) to (B, 1, D), or one per token (B, N) to (B, N, D)."""
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)
        dtype = self.timestep_proj.fc1.weight.dtype
        return self.timestep_proj(timestep_features(timestep, self.freq_dim, dtype))


class Block(nn.Module):
    """Transformer block with six adaptive statistics; the modulated tokens carry the residual.

    Args:
        dim: Token width.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLP over token width.
        qkv_bias: Whether queries, keys and values have a bias.
        modulation_type: Norm class that makes the statistics; :class:`AdaLayerNormZero` when None.

    Attributes:
        mlp_checkpointing: Recompute modulations and MLP in backward.
        stg_skip: Let the last third of the batch pass by (spatiotemporal guidance).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        modulation_type: type[AdaptiveNorm] | None = None,
    ) -> None:
        super().__init__()
        self.mlp_checkpointing = False
        self.stg_skip = False
        self.modulation = (modulation_type or AdaLayerNormZero)(dim, num_stats=6, eps=1e-6)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor, z: Tensor, pe_func: PositionFunction | None = None) -> Tensor:
        """Tokens (B, L, D) under the time embedding ``z``; ``pe_func`` as for the attention."""
        if not self.stg_skip:
            return self._run(x, z, pe_func)
        third = x.size(0) // 3
        kept, skipped = x.split([x.size(0) - third, third])
        return torch.cat([self._run(kept, z[: len(kept)], pe_func), skipped])

    def _run(self, x: Tensor, z: Tensor, pe_func: PositionFunction | None) -> Tensor:
        enabled = self.mlp_checkpointing
        x, stats = run_checkpointed(enabled, self.modulation, x, z)
        attn_gate, mlp_scale, mlp_shift, mlp_gate = stats
        x = x + attn_gate * self.norm1(self.attn(x, pe_func))
        x = self.modulation.norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.norm2(run_checkpointed(enabled, self.mlp, x))


class DiffusionTransformer(nn.Module):
    """Diffusion transformer (DiT, arXiv:2212.09748) with condition tokens in front.

    Args:
        depth: Number of blocks.
        embed_dim: Token width D.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the MLPs over token width.
        patch_size: Side p of a patch.
        image_size: Latent size; informative.
        image_dim: Latent channels C.
        modulation: Whether the statistics are projected once for all blocks.

    Raises:
        ValueError: If ``image_dim`` is not given.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4,
        patch_size: int = 2,
        image_size: int | Sequence[int] = 32,
        image_dim: int | None = None,
        modulation: bool = True,
    ) -> None:
        super().__init__()
        if image_dim is None:
            raise ValueError("image_dim, the number of latent channels, is required, got None")
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.image_dim = image_dim
        self.patch_embed = PatchEmbed(image_dim, embed_dim, patch_size)
        self.time_embed = TimeEmbed(embed_dim)
        self.modulation = AdaLayerNormZero(embed_dim, num_stats=6, eps=None) if modulation else None
        self.rope = RotaryEmbed3D(embed_dim // num_heads)
        norm_type: type[AdaptiveNorm] = AdaLayerNormSingle if modulation else AdaLayerNormZero
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, modulation_type=norm_type)
            for _ in range(depth)
        )
        self.norm = norm_type(embed_dim)
        self.head = nn.Linear(embed_dim, patch_size**2 * image_dim)

    def forward(
        self, x: Tensor, timestep: Tensor, c: Tensor | None = None, pos: Tensor | None = None
    ) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, C, h, w).
            timestep: (B,); without shared modulation also one per token.
            c: Condition tokens, (B, Lc, D).
            pos: Rotary positions (B or 1, N, 3).

        Returns:
            (B, N, p*p*C).

        Raises:
            ValueError: If timesteps are given per token and the modulation is shared.
        """
        if self.modulation is not None and timestep.ndim > 1:
            raise ValueError(
                f"a shared modulation takes one timestep per sample, got {tuple(timestep.shape)}"
            )
        tokens = self.patch_embed(x)
        c = tokens[:, :0] if c is None else c
        num_condition = c.size(1)
        x = torch.cat([c, tokens], dim=1)
        embedded_time = self.time_embed(timestep)
        z = embedded_time
        if self.modulation is not None:
            z = self.modulation.proj(self.modulation.activation(embedded_time))
        pe_func = None if pos is None else self.rope.get_func(pos, num_condition).to(x.dtype)
        for block in self.blocks:
            x = block(x, z, pe_func)
        x, _ = self.norm(x[:, num_condition:], embedded_time)
        return self.head(x)
