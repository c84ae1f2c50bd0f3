"""The diffusion head: an MLP that denoises each token on its own (MAR, arXiv:2406.11838).

Shapes: B batch, N tokens of the frame, n tokens at work, D condition width, Dd head width,
p patch size, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffnext.models.compilation import compile_static
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

    def select(self, index: int) -> Modulation:
        """The statistics at an index of the first dimension."""
        gate = None if self.gate is None else self.gate[index]
        return Modulation(self.factor[index], self.shift[index], gate)


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

    def modulate(self, x: Tensor, modulation: Modulation) -> Tensor:
        """As :meth:`forward`, with the statistics of the condition; shapes broadcast."""
        assert modulation.gate is not None  # only the last norm has none
        h = torch.addcmul(modulation.shift, self.norm1.norm(x), modulation.factor)
        return torch.addcmul(x, modulation.gate, self.norm2(self.proj(h)))


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
        """Whether :meth:`denoise_step` is compiled; numbers of tokens are then padded."""
        return self._compiled is not None

    def compile_denoising(self, **options: Any) -> None:
        """Compile :meth:`denoise_modulated`; options of ``torch.compile``."""
        self._compiled = compile_static(type(self).denoise_modulated, **options)

    def compile_training(self, **options: Any) -> None:
        """Compile the blocks for when gradients are recorded; options of ``torch.compile``."""
        self._training_block = torch.compile(DiffusionBlock.__call__, **options)

    def denoise_step(
        self, patches: Tensor, modulations: Sequence[Modulation], matrix: PatchMatrix
    ) -> Tensor:
        """:meth:`denoise_modulated`, compiled after :meth:`compile_denoising`."""
        denoise = self._compiled or type(self).denoise_modulated
        return denoise(self, patches, modulations, matrix)

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

    def denoise_modulated(
        self, patches: Tensor, modulations: Sequence[Modulation], matrix: PatchMatrix
    ) -> Tensor:
        """As :meth:`denoise`, with the statistics of :meth:`prepare_modulations`.

        Args:
            patches: (..., n, p*p*C), broadcastable to the statistics: passes of guidance may
                share their patches.
            modulations: Each (..., n, Dd).
            matrix: Projects patches, from ``patch_embed``, made once for all steps.

        Returns:
            (..., n, p*p*C) of the statistics' shape.
        """
        y = self.patch_embed.embed_patches(patches, matrix)
        *inner, last = modulations
        for block, modulation in zip(self._typed_blocks, inner, strict=True):
            y = block.modulate(y, modulation)
        return self.head(torch.addcmul(last.shift, self.norm.norm(y), last.factor))


def _ready(scale: Tensor, shift: Tensor, gate: Tensor | None = None) -> Modulation:
    """Statistics from a norm's projection; the scale becomes a factor in place."""
    return Modulation(scale.add_(1), shift, gate)
