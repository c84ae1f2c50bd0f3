"""The interface of all video autoencoders.

Shapes: B batch, C latent channels, F frames, T latent frames, H W pixels, h w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from diffnext.models.autoencoders.modeling_utils import DecoderOutput, LatentScalingMixin
from diffnext.models.autoencoders.tiling import TilingMixin
from diffnext.models.autoencoders.video_layers import apply_per_frame

__all__ = ["VideoAutoencoderMixin"]


class VideoAutoencoderMixin(LatentScalingMixin, TilingMixin):
    """``encode`` and ``decode`` of pictures and videos, for models of encoder and decoder.

    The model provides ``encoder``, ``decoder``, ``quant_conv``, ``post_quant_conv`` and
    ``latent_dist``. Pictures are clips of one frame.
    """

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode pictures or videos.

        Args:
            x: Pictures (B, 3, H, W) or videos (B, 3, F, H, W), -1 to 1.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``latent_dist`` with ``parameters``, (B, 2C, h, w) or (B, 2C, T, h, w), and a method
            ``sample``.

        Raises:
            ValueError: If the shape does not fit, or the length is not legal.
        """
        check_shape("pictures or videos", x, self.config.in_channels)
        video = self.forward(x.unsqueeze(2) if x.ndim == 4 else x)
        moments = torch.cat([self._moments(part) for part in self._slices(video)])
        latent_dist = self.latent_dist(moments.squeeze(2) if x.ndim == 4 else moments)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    def decode(self, z: Tensor, *args: Any, return_dict: bool = True) -> DecoderOutput | tuple:
        """Decode latents.

        Args:
            z: Unscaled latents, (B, C, h, w) or (B, C, T, h, w).
            *args: Further arguments of the decoder, one row a sample.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``sample``: (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1.

        Raises:
            ValueError: If the shape does not fit, or the length is not legal.
        """
        check_shape("latents", z, self.config.latent_channels)
        video = self.forward(z.unsqueeze(2) if z.ndim == 4 else z)
        parts = zip(*(self._slices(argument) for argument in (video, *args)), strict=True)
        sample = torch.cat([self._pixels(*part) for part in parts])
        sample = sample.squeeze(2) if z.ndim == 4 else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input; offload hooks attach here."""
        return x

    def _moments(self, x: Tensor) -> Tensor:
        return apply_per_frame(self.quant_conv, self.tiled_encoder(x))

    def _pixels(self, z: Tensor, *args: Any) -> Tensor:
        return self.tiled_decoder(apply_per_frame(self.post_quant_conv, z), *args)

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """One sample at a time when slicing is enabled."""
        return x.split(1) if self.use_slicing else (x,)


def check_shape(what: str, x: Tensor, channels: int) -> None:
    """Raise unless ``x`` is (B, channels, H, W) or (B, channels, F, H, W)."""
    if x.ndim not in (4, 5) or x.size(1) != channels:
        raise ValueError(
            f"{what} must be (B, {channels}, H, W) or (B, {channels}, T, H, W), "
            f"got {tuple(x.shape)}"
        )
