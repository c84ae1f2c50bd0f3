"""The causal video autoencoder of CogVideoX: 4x8x8 pixels to one latent.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.autoencoders.modeling_utils import DiagonalGaussianDistribution
from diffnext.models.autoencoders.video_autoencoder import VideoAutoencoderMixin
from diffnext.models.autoencoders.video_layers import CausalConv3d, apply_per_frame
from diffnext.models.modeling_utils import StrictLoadingMixin

__all__ = ["AutoencoderKLCogVideoX"]

# Levels, of encoder and decoder alike, that also change time; the one behind changes space alone.
_TIME_LEVELS = 2


class AdaGroupNorm(nn.GroupNorm):
    """Group normalisation, scaled and shifted by the latents where there are any.

    Args:
        dim: Channels.
        z_dim: Latent channels; None for a plain normalisation.
    """

    def __init__(self, dim: int, z_dim: int | None = None) -> None:
        super().__init__(32, dim, eps=1e-6)
        self.scale = None if z_dim is None else CausalConv3d(z_dim, dim, 1)
        self.shift = None if z_dim is None else CausalConv3d(z_dim, dim, 1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: (B, c, F, H, W).
            z: Latents, (B, C, T, h, w).
        """
        x = super().forward(x)
        if self.scale is None:
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


class ResBlock(nn.Module):
    """Residual block of two causal convolutions.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        z_dim: Latent channels that the norms see; None in the encoder.
    """

    def __init__(self, dim: int, out_dim: int, z_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = AdaGroupNorm(dim, z_dim)
        self.conv1 = CausalConv3d(dim, out_dim, 3, padding=1)
        self.norm2 = AdaGroupNorm(out_dim, z_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == out_dim else CausalConv3d(dim, out_dim, 1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(B, dim, F, H, W) to (B, out_dim, F, H, W), under latents ``z``."""
        h = self.conv1(F.silu(self.norm1(x, z)))
        h = self.conv2(F.silu(self.norm2(h, z)))
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """Halves the size, and time if asked to: 1 + 2 n frames to 1 + n.

    Args:
        dim: Channels.
        has_time: Whether time is halved.
    """

    def __init__(self, dim: int, has_time: bool) -> None:
        super().__init__()
        self.has_time = has_time
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, F, H, W), reduced; pairs of frames behind the first are averaged."""
        if self.has_time and x.size(2) > 1:
            pairs = x[:, :, 1:].unflatten(2, (-1, 2)).mean(dim=3)
            x = torch.cat([x[:, :, :1], pairs], dim=2)
        return apply_per_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size, and time if asked to: 1 + n frames to 1 + 2 n.

    Args:
        dim: Channels.
        has_time: Whether time is doubled.
    """

    def __init__(self, dim: int, has_time: bool) -> None:
        super().__init__()
        self.has_time = has_time
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T, h, w), enlarged by nearest neighbours and smoothed."""
        first = F.interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0))
        if x.size(2) > 1:
            scale = (2.0 if self.has_time else 1.0, 2.0, 2.0)
            first = torch.cat([first, F.interpolate(x[:, :, 1:], scale_factor=scale)], dim=2)
        return apply_per_frame(self.conv, first)


class MidBlock(nn.Module):
    """Two residual blocks.

    Args:
        dim: Channels.
        z_dim: Latent channels that the norms see; None in the encoder.
    """

    def __init__(self, dim: int, z_dim: int | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, dim, z_dim), ResBlock(dim, dim, z_dim)])

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(B, c, F, H, W) to the same, under latents ``z``."""
        for resnet in self.resnets:
            x = resnet(x, z)
        return x


class DownBlock(nn.Module):
    """One level of the encoder.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        depth: Residual blocks.
        downsample: What ends the level, if anything does.
    """

    def __init__(self, dim: int, out_dim: int, depth: int, downsample: Downsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(out_dim if i else dim, out_dim) for i in range(depth))
        self.downsamplers = nn.ModuleList([] if downsample is None else [downsample])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, F, H, W), reduced."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One level of the decoder.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        depth: Residual blocks.
        z_dim: Latent channels that the norms see.
        upsample: What ends the level, if anything does.
    """

    def __init__(
        self, dim: int, out_dim: int, depth: int, z_dim: int, upsample: Upsample | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(out_dim if i else dim, out_dim, z_dim) for i in range(depth)
        )
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, c, T, h, w), enlarged, under latents ``z``."""
        for resnet in self.resnets:
            x = resnet(x, z)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Encoder(nn.Module):
    """Clip to moments.

    Args:
        dim: Channels of the pictures.
        out_dim: Channels of the moments.
        widths: Width of each level.
        depth: Residual blocks a level.
    """

    def __init__(self, dim: int, out_dim: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = CausalConv3d(dim, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            downsample = Downsample(width, has_time=i < _TIME_LEVELS) if i < last else None
            before = widths[max(i - 1, 0)]
            self.down_blocks.append(DownBlock(before, width, depth, downsample))
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = AdaGroupNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, F, H, W) to (B, 2C, T, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to clip; every norm sees the latents.

    Args:
        dim: Channels of the latents.
        out_dim: Channels of the pictures.
        widths: Width of each level, from small to large pictures.
        depth: Residual blocks a level.
    """

    def __init__(self, dim: int, out_dim: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = CausalConv3d(dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], dim)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            upsample = Upsample(width, has_time=i < _TIME_LEVELS) if i < last else None
            before = widths[max(i - 1, 0)]
            self.up_blocks.append(UpBlock(before, width, depth, dim, upsample))
        self.conv_norm_out = AdaGroupNorm(widths[-1], dim)
        self.conv_out = CausalConv3d(widths[-1], out_dim, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T, h, w) to (B, 3, F, H, W)."""
        x = self.mid_block(self.conv_in(z), z)
        for block in self.up_blocks:
            x = block(x, z)
        return self.conv_out(F.silu(self.conv_norm_out(x, z)))


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKLCogVideoX(VideoAutoencoderMixin, StrictLoadingMixin, ModelMixin, ConfigMixin):
    """Causal video autoencoder of CogVideoX (arXiv:2408.06072).

    Clips of 17 frames are 5 latent frames; longer ones are cut into tiles that share a frame of
    pixels but none of latents, so that 33 frames are 10 latent frames.

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
        force_upcast: Kept in the config for other tools.
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
        self.quant_conv = CausalConv3d(moments, moments, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            CausalConv3d(latent_channels, latent_channels, 1)
            if use_post_quant_conv
            else nn.Identity()
        )
        self.latent_dist = DiagonalGaussianDistribution

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames a latent frame stands for, but the first."""
        return 2 ** min(len(self.config.block_out_channels) - 1, _TIME_LEVELS)
