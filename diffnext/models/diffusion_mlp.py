"""The diffusion head: an MLP that denoises each token on its own (MAR, arXiv:2406.11838).

Shapes: B batch, N tokens of the frame, n tokens at work, D condition width, Dd head width,
p patch size, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.compilation import compile_static
from diffnext.models.direct_calls import Layer, direct
from diffnext.models.embeddings import (
    PatchEmbed,
    PatchMatrix,
    gather_tokens,
    scatter_tokens,
    timestep_features,
)
from diffnext.models.normalization import AdaLayerNorm, AdaLayerNormZero
from diffnext.models.vision_transformer import Projector, run_checkpointed

__all__ = ["DiffusionBlock", "DiffusionMLP", "Modulation", "Projector", "TimeCondEmbed"]


class Modulation(NamedTuple):
    """Statistics of one adaptive norm, ready to use; all of one shape (..., n, Dd).

    Attributes:
        factor: 1 + scale.
        shift: Added after the multiplication.
        gate: Weight of the residual branch; the last norm has None.
    """

    factor: Tensor
    shift: Tensor
    gate: Tensor | None = None

    def unbind(self) -> list[Modulation]:
        """The statistics at each index of the first dimension."""
        parts = [part.unbind() for part in self if part is not None]
        return [Modulation(*one) for one in zip(*parts, strict=True)]


class BlockLayers(NamedTuple):
    """What a block calls for modulated tokens, in order."""

    norm1: Layer
    fc1: Layer
    activation: Layer
    fc2: Layer
    norm2: Layer

    def modulate(self, x: Tensor, modulation: Modulation) -> Tensor:
        """As :meth:`DiffusionBlock.forward`, with the statistics of the condition."""
        factor, shift, gate = modulation
        assert gate is not None  # only the last norm has none
        h = torch.addcmul(shift, self.norm1(x), factor)
        h = self.fc2(self.activation(self.fc1(h)))
        return torch.addcmul(x, gate, self.norm2(h))


class HeadLayers(NamedTuple):
    """What the head calls for modulated tokens.

    Attributes:
        embed: Projects patches.
        blocks: Of every block.
        norm: The last norm.
        head: Projects to patches.
    """

    embed: PatchMatrix
    blocks: Sequence[BlockLayers]
    norm: Layer
    head: Layer

    def denoise(self, patches: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """As :meth:`DiffusionMLP.denoise`, with the statistics of the condition.

        Args:
            patches: (..., n, p*p*C), broadcastable to the statistics: passes of guidance may
                share their patches.
            modulations: Of :meth:`DiffusionMLP.prepare_modulations`, each (..., n, Dd).

        Returns:
            (..., n, p*p*C) of the statistics' shape.
        """
        y = F.linear(patches, *self.embed)
        *inner, last = modulations
        for block, modulation in zip(self.blocks, inner, strict=True):
            y = block.modulate(y, modulation)
        return self.head(torch.addcmul(last.shift, self.norm(y), last.factor))


class DiffusionBlock(nn.Module):
    """Gated residual MLP whose norm follows the condition.

    Args:
        dim: Token width Dd.

    Attributes:
        mlp_checkpointing: Recompute the block's two stages in backward.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_checkpointing = False
        self.norm1 = AdaLayerNormZero(dim, num_stats=3, eps=1e-6)
        self.proj = Projector(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Tokens (B, n, Dd) under condition ``z``, same shape or (B, 1, Dd)."""
        h, (gate,) = run_checkpointed(self.mlp_checkpointing, self.norm1, x, z)
        h = run_checkpointed(self.mlp_checkpointing, self.proj, h)
        return x + gate * self.norm2(h)

    def layers(self) -> tuple[nn.Module, ...]:
        """What :class:`BlockLayers` holds."""
        return self.norm1.norm, *self.proj.layers(), self.norm2


class TimeCondEmbed(nn.Module):
    """Sum of the condition and the diffusion timestep, both projected to the head width.

    Args:
        cond_dim: Condition width D.
        embed_dim: Head width Dd.
        freq_dim: Width of the timestep features.
    """

    def __init__(self, cond_dim: int, embed_dim: int, freq_dim: int = 256) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.timestep_proj = Projector(freq_dim, embed_dim, embed_dim)
        self.condition_proj = Projector(cond_dim, embed_dim, embed_dim)

    def get_freq_embed(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Features of timesteps (...,): (..., freq_dim)."""
        return timestep_features(timestep, self.freq_dim, dtype)

    def embed_timestep(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Projected timesteps, (B,) -> (B, 1, Dd) or per token (B, n) -> (B, n, Dd)."""
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)
        return self.timestep_proj(self.get_freq_embed(timestep, dtype))

    def forward(self, timestep: Tensor, z: Tensor) -> Tensor:
        """Embed.

        Args:
            timestep: (B,) for all tokens, or one per token (B, n).
            z: Condition, (B, n, D).

        Returns:
            (B, n, Dd).
        """
        return self.condition_proj(z) + self.embed_timestep(timestep, z.dtype)


class DiffusionMLP(nn.Module):
    """Per-token denoiser.

    Args:
        depth: Number of blocks.
        embed_dim: Head width Dd.
        cond_dim: Condition width D.
        patch_size: Side p of a patch.
        image_dim: Latent channels C.
    """

    def __init__(
        self, depth: int, embed_dim: int, cond_dim: int, patch_size: int = 2, image_dim: int = 4
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(image_dim, embed_dim, patch_size)
        self.time_cond_embed = TimeCondEmbed(cond_dim, embed_dim)
        self.blocks = nn.ModuleList(DiffusionBlock(embed_dim) for _ in range(depth))
        self.norm = AdaLayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, patch_size**2 * image_dim)
        self._compiled: Callable[..., Tensor] | None = None
        self._training_block: Callable[..., Tensor] = DiffusionBlock.__call__

    @property
    def _typed_blocks(self) -> Iterable[DiffusionBlock]:
        return cast("Iterable[DiffusionBlock]", self.blocks)

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`denoiser` is compiled; numbers of tokens are then padded."""
        return self._compiled is not None

    def compile_denoising(self, **options: Any) -> None:
        """Compile :meth:`denoiser`; options of ``torch.compile``."""
        self._compiled = compile_static(type(self)._denoise_modulated, **options)

    def compile_training(self, **options: Any) -> None:
        """Compile the blocks for when gradients are recorded; options of ``torch.compile``."""
        self._training_block = torch.compile(DiffusionBlock.__call__, **options)

    def denoiser(self) -> Callable[[Tensor, Sequence[Modulation]], Tensor]:
        """:meth:`HeadLayers.denoise` with the present parameters, for all steps of a set."""
        matrix = self.patch_embed.matrix()
        if self._compiled is not None:
            return partial(self._compiled, self, matrix)
        return self._layers(matrix, direct).denoise

    def _denoise_modulated(
        self, matrix: PatchMatrix, patches: Tensor, modulations: Sequence[Modulation]
    ) -> Tensor:
        return self._layers(matrix, lambda layer: layer).denoise(patches, modulations)

    def _layers(self, matrix: PatchMatrix, take: Callable[[nn.Module], Layer]) -> HeadLayers:
        blocks = [BlockLayers(*map(take, block.layers())) for block in self._typed_blocks]
        return HeadLayers(matrix, blocks, take(self.norm.norm), take(self.head))

    def forward(
        self, x: Tensor, timestep: Tensor, z: Tensor, pred_ids: Tensor | None = None
    ) -> Tensor:
        """Predict noise or velocity.

        Args:
            x: Noisy latents, (B, C, h, w).
            timestep: Diffusion timestep, (B,) or one per token (B, N).
            z: Condition of every token, (B, N, D).
            pred_ids: Tokens to work on, (B, n, 1); all when None.

        Returns:
            Predictions in patches, (B, N, p*p*C); where ``pred_ids`` leaves tokens out, the
            patches of ``x`` itself.
        """
        patches = self.patch_embed.patchify(x)
        if pred_ids is None:
            return self.denoise(patches, self.time_cond_embed(timestep, z))
        if timestep.ndim == 2:
            timestep = timestep.gather(1, pred_ids.squeeze(-1))
        z = self.time_cond_embed(timestep, gather_tokens(z, pred_ids))
        prediction = self.denoise(gather_tokens(patches, pred_ids), z)
        return scatter_tokens(patches, pred_ids, prediction.to(patches.dtype))

    def denoise(self, patches: Tensor, z: Tensor) -> Tensor:
        """Predict from noisy patches.

        Args:
            patches: (B, n, p*p*C).
            z: Embedded time and condition, (B, n, Dd).

        Returns:
            (B, n, p*p*C).
        """
        y = self.patch_embed.embed_patches(patches)
        run = self._training_block if torch.is_grad_enabled() else DiffusionBlock.__call__
        for block in self._typed_blocks:
            y = run(block, y, z)
        return self.head(self.norm(y, z))

    @torch.no_grad()
    def prepare_modulations(self, z: Tensor) -> list[Modulation]:
        """Everything the denoiser computes from the condition only.

        Args:
            z: Embedded time and condition, (..., n, Dd), of one or many steps.

        Returns:
            The statistics of the norm of each block, then of the last norm.
        """
        activated = self.norm.activation(z)
        norms = [*(block.norm1 for block in self._typed_blocks), self.norm]
        return [_ready(*norm.statistics(activated)) for norm in norms]


def _ready(scale: Tensor, shift: Tensor, gate: Tensor | None = None) -> Modulation:
    """Statistics from a norm's projection; the scale becomes a factor in place."""
    return Modulation(scale.add_(1), shift, gate)
