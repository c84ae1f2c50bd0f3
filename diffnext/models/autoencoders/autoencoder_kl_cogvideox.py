"""The causal video autoencoder of CogVideoX: 4x8x8 pixels to one latent.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.autoencoders.video_autoencoder import VideoAutoencoder
from diffnext.models.autoencoders.video_layers import (
    CausalConv3d,
    ClipDecoder,
    ClipEncoder,
    Downsample,
    FrameConv2d,
    Level,
    ResBlock,
    Upsample,
    pointwise,
)

__all__ = ["AutoencoderKLCogVideoX"]

# Levels of encoder and decoder that also change time; the next one only changes space.
_TIME_LEVELS = 2


class AdaGroupNorm(nn.GroupNorm):
    """Group normalisation, scaled and shifted by the latents if there are any.

    Args:
        dim: Channels.
        z_dim: Latent channels; None for a plain normalisation.
    """

    def __init__(self, dim: int, z_dim: int | None = None) -> None:
        super().__init__(32, dim, eps=1e-6)
        if z_dim is not None:
            self.scale = CausalConv3d(z_dim, dim, 1)
            self.shift = CausalConv3d(z_dim, dim, 1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: (B, c, F, H, W).
            z: Latents, (B, C, T, h, w).
        """
        x = super().forward(x)
        if z is None:
            return x
        z = resize_latents(z, x.shape[2:])
        return x * self.scale(z) + self.shift(z)


def resize_latents(z: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbours at another size; of an odd clip the first frame stays the first.

    Args:
        z: (B, C, T, h, w).
        size: Frames, height and width wanted.
    """
    frames, *space = size
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, size=(frames, *space))
    first = F.interpolate(z[:, :, :1], size=(1, *space))
    later = F.interpolate(z[:, :, 1:], size=(frames - 1, *space))
    return torch.cat([first, later], dim=2)


class Encoder(ClipEncoder):
    """Clip to moments.

    Args:
        dim: Channels of the pictures.
        out_dim: Channels of the moments.
        widths: Width of each level.
        depth: Residual blocks per level.
    """

    def __init__(self, dim: int, out_dim: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        block = partial(ResBlock, conv=CausalConv3d, norm=AdaGroupNorm)
        self.conv_in = CausalConv3d(dim, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            downsample = partial(Downsample, conv=FrameConv2d, has_time=i < _TIME_LEVELS)
            before = widths[max(i - 1, 0)]
            is_last = i == len(widths) - 1
            level = Level(before, width, depth, block, downsample=None if is_last else downsample)
            self.down_blocks.append(level)
        self.mid_block = Level(widths[-1], widths[-1], 2, block)
        self.conv_norm_out = AdaGroupNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_dim, 3, padding=1)


class Decoder(ClipDecoder):
    """Latents to clip; every norm sees the latents.

    Args:
        dim: Channels of the latents.
        out_dim: Channels of the pictures.
        widths: Width of each level, from small to large pictures.
        depth: Residual blocks per level.
    """

    sees_latents = True

    def __init__(self, dim: int, out_dim: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        norm = partial(AdaGroupNorm, z_dim=dim)
        block = partial(ResBlock, conv=CausalConv3d, norm=norm)
        self.conv_in = CausalConv3d(dim, widths[0], 3, padding=1)
        self.mid_block = Level(widths[0], widths[0], 2, block)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            upsample = partial(Upsample, conv=FrameConv2d, has_time=i < _TIME_LEVELS)
            before = widths[max(i - 1, 0)]
            is_last = i == len(widths) - 1
            level = Level(before, width, depth, block, upsample=None if is_last else upsample)
            self.up_blocks.append(level)
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_dim, 3, padding=1)


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKLCogVideoX(VideoAutoencoder, ModelMixin):
    """Causal video autoencoder of CogVideoX (arXiv:2408.06072).

    Clips of 17 frames are 5 latent frames; longer ones are cut into tiles that share a frame of
    pixels but none of latents, so 33 frames are 10 latent frames.

    Args:
        in_channels: Channels of the pictures.
        out_channels: Channels of the reconstructions.
        down_block_types: Ignored.
        up_block_types: Ignored.
        block_out_channels: Width of each level; every level but the last halves the size, the
            first two also time.
        layers_per_block: Residual blocks per encoder level; the decoder has one more.
        act_fn: Ignored; SiLU.
        latent_channels: Channels C of the latents.
        norm_num_groups: Ignored; 32.
        sample_size: Size the model was trained at; informative.
        scaling_factor: Multiplier that brings latents to unit variance.
        shift_factor: Mean of the latents, subtracted before scaling.
        latents_mean: Ignored.
        latents_std: Ignored.
        force_upcast: Kept in the config for pipelines: whether float16 ones decode in float32.
        use_quant_conv: Whether a 1x1x1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1x1x1 convolution precedes the decoder.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("CogVideoXDownBlock3D",) * 4,
        up_block_types: Sequence[str] = ("CogVideoXUpBlock3D",) * 4,
        block_out_channels: Sequence[int] = (128, 256, 256, 512),
        layers_per_block: int = 3,
        act_fn: str = "silu",
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        sample_size: int = 480,
        scaling_factor: float = 0.7,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
    ) -> None:
        super().__init__(sample_min_t=17, latent_min_t=5, sample_ovr_t=1, latent_ovr_t=0)
        moments = 2 * latent_channels
        self.encoder = Encoder(in_channels, moments, block_out_channels, layers_per_block)
        self.decoder = Decoder(
            latent_channels, out_channels, block_out_channels[::-1], layers_per_block + 1
        )
        self.quant_conv = pointwise(CausalConv3d, moments, use_quant_conv)
        self.post_quant_conv = pointwise(CausalConv3d, latent_channels, use_post_quant_conv)
        levels = len(block_out_channels) - 1
        self.spatial_compression_ratio = 2**levels
        self.temporal_compression_ratio = 2 ** min(levels, _TIME_LEVELS)
