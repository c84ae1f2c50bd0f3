"""The interface of all video autoencoders.

Shapes: B batch, C latent channels, F frames, T latent frames, H W pixels, h w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffnext.models.autoencoders.modeling_utils import DecoderOutput, EncoderOutput, LatentsMixin
from diffnext.models.autoencoders.tiling import TilingMixin

__all__ = ["VideoAutoencoder"]


class VideoAutoencoder(TilingMixin, LatentsMixin):
    """``encode`` and ``decode`` of pictures and videos, for models of encoder and decoder.

    The model provides ``encoder``, ``decoder``, ``quant_conv`` and ``post_quant_conv``. Pictures
    are clips of one frame.
    """

    quant_conv: nn.Module
    post_quant_conv: nn.Module

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple:
        """Encode pictures or videos.

        Args:
            x: Pictures (B, 3, H, W) or videos (B, 3, F, H, W), -1 to 1.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``latent_dist``, a posterior with ``parameters``, (B, 2C, h, w) or (B, 2C, T, h, w).

        Raises:
            ValueError: If the shape does not fit, or the length is not legal.
        """
        check_shape("pictures or videos", x, self.config["in_channels"])
        video = self.forward(x.unsqueeze(2) if x.ndim == 4 else x)
        parts = [self.quant_conv(self.tiled_encoder(part)) for part in self.slices(video)]
        moments = torch.cat(parts)
        return self.posterior(moments.squeeze(2) if x.ndim == 4 else moments, return_dict)

    @apply_forward_hook
    def decode(self, z: Tensor, *args: Any, return_dict: bool = True) -> DecoderOutput | tuple:
        """Decode latents.

        Args:
            z: Unscaled latents, (B, C, h, w) or (B, C, T, h, w).
            *args: Further arguments of the decoder, one row per sample.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``sample``: (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1.

        Raises:
            ValueError: If the shape does not fit, or the length is not legal.
        """
        check_shape("latents", z, self.config["latent_channels"])
        video = self.forward(z.unsqueeze(2) if z.ndim == 4 else z)
        rows = zip(*(self.slices(argument) for argument in (video, *args)), strict=True)
        sample = torch.cat(
            [self.tiled_decoder(self.post_quant_conv(row), *rest) for row, *rest in rows]
        )
        sample = sample.squeeze(2) if z.ndim == 4 else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def check_shape(what: str, x: Tensor, channels: int) -> None:
    """Raise unless ``x`` is (B, channels, H, W) or (B, channels, F, H, W)."""
    if x.ndim not in (4, 5) or x.size(1) != channels:
        raise ValueError(
            f"{what} must be (B, {channels}, H, W) or (B, {channels}, T, H, W), "
            f"got {tuple(x.shape)}"
        )
