"""Layer norms whose scale and shift come from a condition (AdaLN, DiT, arXiv:2212.09748).

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AdaLayerNorm", "AdaLayerNormSingle", "AdaLayerNormZero"]


def _plain_norm(dim: int, eps: float | None) -> nn.Module:
    """Layer norm without parameters; the identity when ``eps`` is falsy."""
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=False) if eps else nn.Identity()


class _ProjectedNorm(nn.Module):
    """Layer norm with a projection from a condition to its statistics."""

    def __init__(
        self, dim: int, rank: int | None = None, num_stats: int = 2, eps: float | None = 1e-6
    ) -> None:
        super().__init__()
        self.num_stats = num_stats
        self.lora = nn.Linear(dim, rank, bias=False) if rank else nn.Identity()
        self.proj = nn.Linear(rank or dim, num_stats * dim)
        self.norm = _plain_norm(dim, eps)
        self.activation = nn.SiLU()

    def statistics(self, activated: Tensor) -> tuple[Tensor, ...]:
        """Scale, shift and others of a condition after its activation, (..., D) each."""
        return self.proj(self.lora(activated)).chunk(self.num_stats, dim=-1)


class AdaLayerNormZero(_ProjectedNorm):
    """Adaptive layer norm that also returns further statistics, such as gates.

    Args:
        dim: Token width.
        rank: Width of a low-rank bottleneck before the projection; none when None or 0.
        num_stats: How many vectors to project; the first two are scale and shift.
        eps: Epsilon of the norm; None switches the norm off.
    """

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalise ``x`` (B, L, D) by condition ``z``, broadcastable to it.

        Returns:
            norm(x) * (1 + scale) + shift, and the other statistics.
        """
        scale, shift, *others = self.statistics(self.activation(z))
        return self.norm(x) * (1 + scale) + shift, tuple(others)


class AdaLayerNorm(_ProjectedNorm):
    """Adaptive layer norm with scale and shift only.

    Args:
        dim: Token width.
        rank: As for :class:`AdaLayerNormZero`.
        eps: As for :class:`AdaLayerNormZero`.
    """

    def __init__(self, dim: int, rank: int | None = None, eps: float | None = 1e-6) -> None:
        super().__init__(dim, rank, num_stats=2, eps=eps)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """norm(x) * (1 + scale(z)) + shift(z)."""
        scale, shift = self.statistics(self.activation(z))
        return self.norm(x) * (1 + scale) + shift


class AdaLayerNormSingle(nn.Module):
    """Adaptive layer norm around statistics projected once for all layers (arXiv:2310.00426).

    Args:
        dim: Token width.
        num_stats: How many vectors; the first two are scale and shift.
        eps: Epsilon of the norm; None switches the norm off.
    """

    def __init__(self, dim: int, num_stats: int = 2, eps: float | None = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.num_stats = num_stats
        self.bias = nn.Parameter(torch.zeros(num_stats, dim))
        nn.init.normal_(self.bias, std=dim**-0.5)
        self.norm = _plain_norm(dim, eps)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalise ``x`` (B, L, D).

        Args:
            x: Tokens.
            z: Shared statistics (B, 1, num_stats * D), or one vector (B, 1, D) for all of them.

        Returns:
            norm(x) * (1 + scale) + shift, and the other statistics.
        """
        if z.size(-1) == self.dim:
            stats = (z + self.bias).chunk(self.num_stats, dim=-2)
        else:
            stats = (z + self.bias.flatten()).chunk(self.num_stats, dim=-1)
        scale, shift, *others = stats
        return self.norm(x) * (1 + scale) + shift, tuple(others)
