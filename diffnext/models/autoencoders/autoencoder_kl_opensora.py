"""The causal video autoencoder of Open-Sora-Plan: 4x8x8 pixels to one latent.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W pixels. Parts that
are two-dimensional see frames as a batch: (B*F, c, H, W).
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
from diffnext.models.autoencoders.video_layers import CausalConv3d, fold_frames, unfold_frames
from diffnext.models.modeling_utils import StrictLoadingMixin

__all__ = ["AutoencoderKLOpenSora"]

ConvType = type[nn.Conv2d] | type[CausalConv3d]


def conv_type(block_type: str) -> ConvType:
    """The convolution of a level, from the name of its block type."""
    return nn.Conv2d if "Block2D" in block_type else CausalConv3d


def group_norm(dim: int) -> nn.GroupNorm:
    """Normalisation over 32 groups of channels and all positions."""
    return nn.GroupNorm(32, dim, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block of two convolutions.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        conv: Convolution, 2-D or causal 3-D.
    """

    def __init__(self, dim: int, out_dim: int, conv: ConvType) -> None:
        super().__init__()
        self.norm1 = group_norm(dim)
        self.conv1 = conv(dim, out_dim, 3, padding=1)
        self.norm2 = group_norm(out_dim)
        self.conv2 = conv(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == out_dim else conv(dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, ...) to (B, out_dim, ...)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame.

    Args:
        dim: Channels.
    """

    _from_deprecated_attn_block = True  # diffusers renames the keys of old checkpoints

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.group_norm = group_norm(dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) or (B, c, F, H, W) to the same; the norm sees all frames."""
        tokens = fold_frames(self.group_norm(x)).flatten(2).transpose(1, 2)  # (B*F, H*W, c)
        h = F.scaled_dot_product_attention(
            self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        )
        h = self.to_out[0](h[:, 0]).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + (h if x.ndim == 4 else unfold_frames(h, x.size(2)))


class Downsample(nn.Module):
    """Halves the size; the 3-D one also time, F to (F - 1) // 2 + 1.

    Args:
        dim: Channels.
        conv: Convolution, 2-D or causal 3-D.
    """

    def __init__(self, dim: int, conv: ConvType) -> None:
        super().__init__()
        self.conv = conv(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, ..., H, W) to (B, c, ..., H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size, and time if asked to: T to 1 + 2 (T - 1).

    Args:
        dim: Channels.
        conv: Convolution, 2-D or causal 3-D.
        has_time: Whether a 3-D one also doubles time.
    """

    def __init__(self, dim: int, conv: ConvType, has_time: bool) -> None:
        super().__init__()
        self.has_time = has_time and conv is CausalConv3d
        kernel = 3 if self.has_time or conv is nn.Conv2d else (1, 3, 3)
        self.conv = conv(dim, dim, kernel, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) or (B, c, T, H, W), enlarged."""
        if self.has_time:
            return self.conv(self._interpolate(x))
        scale = (2.0,) * 2 if x.ndim == 4 else (1.0, 2.0, 2.0)
        return self.conv(F.interpolate(x, scale_factor=scale, mode="nearest"))

    @staticmethod
    def _interpolate(x: Tensor) -> Tensor:
        """The first frame stays one frame; the others become two each."""
        first = F.interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0), mode="trilinear")
        if x.size(2) == 1:
            return first
        later = F.interpolate(x[:, :, 1:], scale_factor=(2.0, 2.0, 2.0), mode="trilinear")
        return torch.cat([first, later], dim=2)


class MidBlock(nn.Module):
    """Residual block, attention, residual block.

    Args:
        dim: Channels.
        conv: Convolution, 2-D or causal 3-D.
    """

    def __init__(self, dim: int, conv: ConvType) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, dim, conv), ResBlock(dim, dim, conv)])
        self.attentions = nn.ModuleList([FrameAttention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, ...) to the same."""
        x = self.attentions[0](self.resnets[0](x))
        return self.resnets[1](x)


class DownBlock(nn.Module):
    """One level of the encoder.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        depth: Residual blocks.
        conv: Convolution of this level.
        down_conv: Convolution of the next level, which the size is halved with; None at the end.
    """

    def __init__(
        self, dim: int, out_dim: int, depth: int, conv: ConvType, down_conv: ConvType | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(out_dim if i else dim, out_dim, conv) for i in range(depth)
        )
        self.downsamplers = nn.ModuleList(
            [] if down_conv is None else [Downsample(out_dim, down_conv)]
        )

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Encode one level.

        Args:
            x: (B*F, c, H, W) or (B, c, F, H, W).
            num_frames: Frames F.
        """
        x = match_layer(x, self.resnets[0].conv1, num_frames)
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(match_layer(x, downsample.conv, num_frames))
        return x


class UpBlock(nn.Module):
    """One level of the decoder.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        depth: Residual blocks.
        conv: Convolution of this level.
        has_upsample: Whether the size is doubled at its end.
        has_time: Whether time is, too.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        depth: int,
        conv: ConvType,
        has_upsample: bool,
        has_time: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(out_dim if i else dim, out_dim, conv) for i in range(depth)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_dim, conv, has_time)] if has_upsample else [])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Decode one level; arguments as for :class:`DownBlock`."""
        x = match_layer(x, self.resnets[0].conv1, num_frames)
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def match_layer(x: Tensor, layer: nn.Module, num_frames: int) -> Tensor:
    """Bring a clip into the form a convolution takes: frames in the batch, or in a dimension."""
    return unfold_frames(x, num_frames) if isinstance(layer, nn.Conv3d) else fold_frames(x)


class Encoder(nn.Module):
    """Clip to moments.

    Args:
        dim: Channels of the pictures.
        out_dim: Channels of the moments.
        block_types: Block type of each level.
        widths: Width of each level.
        depth: Residual blocks a level.
    """

    def __init__(
        self, dim: int, out_dim: int, block_types: Sequence[str], widths: Sequence[int], depth: int
    ) -> None:
        super().__init__()
        convs = [conv_type(name) for name in block_types]
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, depth, conv, next_conv)
            for before, width, conv, next_conv in zip(
                [widths[0], *widths], widths, convs, [*convs[1:], None], strict=False
            )
        )
        self.mid_block = MidBlock(widths[-1], convs[-1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = convs[-1](widths[-1], out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, F, H, W) to (B, 2C, T, h, w)."""
        batch = x.size(0)
        x = self.conv_in(fold_frames(x))
        for block in self.down_blocks:
            x = block(x, frame_count(x, batch))
        x = match_layer(x, self.conv_out, frame_count(x, batch))
        x = self.mid_block(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return unfold_frames(x, frame_count(x, batch))


class Decoder(nn.Module):
    """Latents to clip.

    Args:
        dim: Channels of the latents.
        out_dim: Channels of the pictures.
        block_types: Block type of each level, from small to large pictures.
        widths: Width of each level, in the same order.
        depth: Residual blocks a level.
    """

    def __init__(
        self, dim: int, out_dim: int, block_types: Sequence[str], widths: Sequence[int], depth: int
    ) -> None:
        super().__init__()
        convs = [conv_type(name) for name in block_types]
        last = len(widths) - 1
        self.conv_in = convs[-1](dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], convs[-1])
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, depth, conv, has_upsample=i < last, has_time=i < last - 1)
            for i, (before, width, conv) in enumerate(
                zip([widths[0], *widths], widths, convs, strict=False)
            )
        )
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = convs[-1](widths[-1], out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, h, w) to (B, 3, F, H, W)."""
        batch = x.size(0)
        x = self.conv_in(match_layer(x, self.conv_in, x.size(2)))
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x, frame_count(x, batch))
        x = match_layer(x, self.conv_out, frame_count(x, batch))
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return unfold_frames(x, frame_count(x, batch))


def frame_count(x: Tensor, batch: int) -> int:
    """Frames of a clip that is (B, c, F, H, W), or has its frames in the batch."""
    return x.size(2) if x.ndim == 5 else x.size(0) // batch


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKLOpenSora(VideoAutoencoderMixin, StrictLoadingMixin, ModelMixin, ConfigMixin):
    """Causal video autoencoder of NOVA's video models (Open-Sora Plan, arXiv:2412.00131).

    Clips of 17 frames are encoded at once, longer ones in tiles that share a frame: 4 m + 1
    frames are m + 1 latent frames. A level is 2-D or causal 3-D by the name of its block type;
    entering a 3-D level halves time.

    Args:
        in_channels: Channels of the pictures.
        out_channels: Channels of the reconstructions.
        down_block_types: Type of each encoder level; "Block2D" in the name makes it 2-D.
        up_block_types: The same for the decoder, from small to large pictures.
        block_out_channels: Width of each level; every level but the last halves the size.
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
        use_quant_conv: Whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1x1 convolution precedes the decoder.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        super().__init__(sample_min_t=17, latent_min_t=5, sample_ovr_t=1, latent_ovr_t=1)
        self.encoder = Encoder(
            in_channels,
            2 * latent_channels,
            down_block_types,
            block_out_channels,
            layers_per_block,
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels[::-1],
            layers_per_block + 1,
        )
        quant = conv_type(up_block_types[-1])
        self.quant_conv = (
            quant(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        )
        self.post_quant_conv = (
            quant(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        )
        self.latent_dist = DiagonalGaussianDistribution

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames a latent frame stands for: entering a 3-D level halves time."""
        convs = [conv_type(name) for name in self.config.down_block_types[1:]]
        return 2 ** convs.count(CausalConv3d)
