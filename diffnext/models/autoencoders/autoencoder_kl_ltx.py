"""The video autoencoder of LTX-Video: 8x32x32 pixels to one latent.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.autoencoders.modeling_utils import DecoderOutput
from diffnext.models.autoencoders.video_autoencoder import VideoAutoencoder
from diffnext.models.autoencoders.video_layers import CausalConv3d, ClipEncoder, Level
from diffnext.models.diffusion_transformer import TimeEmbed

__all__ = ["AutoencoderKLLTXVideo"]

PATCH_SIZE = 4
# (time, height, width) of each reduction of the encoder.
STRIDES = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
# Buffers that a checkpoint may hold.
FACTORS = ("shift_factors", "scaling_factors")

Stride = tuple[int, int, int]


class SymmetricConv3d(nn.Conv3d):
    """3-D convolution of size 3 that sees one frame on each side, the edge frames repeated.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, F, H, W) to (B, out_channels, F, H, W)."""
        return super().forward(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over channels, (B, c, ...); no parameters."""
    mean_square = x.float().square().mean(dim=1, keepdim=True)
    return x * (mean_square + 1e-8).rsqrt().to(x.dtype)


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """Blocks of positions into channels, ordered (c, time, row, column)."""
    r, p, q = stride
    x = x.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, r))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # (B, c*r*p*q, F/r, H/p, W/q)


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """Inverse of :func:`space_to_depth`."""
    x = x.unflatten(1, (-1, *stride))  # (B, c, r, p, q, F, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def patchify(x: Tensor) -> Tensor:
    """Pixels of a patch into channels, ordered (c, column, row)."""
    return space_to_depth(x.mT, (1, PATCH_SIZE, PATCH_SIZE)).mT


def unpatchify(x: Tensor) -> Tensor:
    """Inverse of :func:`patchify`."""
    return depth_to_space(x.mT, (1, PATCH_SIZE, PATCH_SIZE)).mT


def causal_conv(in_channels: int, out_channels: int) -> CausalConv3d:
    """Causal 3-D convolution of size 3 that keeps the size."""
    return CausalConv3d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """Residual block of two convolutions, modulated by the timestep in the decoder.

    Args:
        dim: Channels.
        is_decoder: Whether it is modulated and not causal.
    """

    scale_shift_table: nn.Parameter | None

    def __init__(self, dim: int, is_decoder: bool = False) -> None:
        super().__init__()
        conv = SymmetricConv3d if is_decoder else causal_conv
        self.conv1 = conv(dim, dim)
        self.conv2 = conv(dim, dim)
        table = nn.Parameter(torch.randn(4, dim) / math.sqrt(dim)) if is_decoder else None
        self.register_parameter("scale_shift_table", table)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, dim, F, H, W) to the same; ``temb`` (B, 1, 4 dim) for decoders."""
        if temb is None or self.scale_shift_table is None:
            h = self.conv1(F.silu(rms_norm(x)))
            return x + self.conv2(F.silu(rms_norm(h)))
        stats = modulation(temb, self.scale_shift_table)
        h = self.conv1(F.silu(rms_norm(x) * (1 + stats[1]) + stats[0]))
        return x + self.conv2(F.silu(rms_norm(h) * (1 + stats[3]) + stats[2]))


def modulation(temb: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Statistics (B, dim, 1, 1, 1) each, from a projected timestep and a learned table."""
    stats = temb.squeeze(1) + table.flatten()  # (B, n * dim)
    return stats.unflatten(1, table.shape)[..., None, None, None].unbind(1)


def causal_block(dim: int, _: int) -> ResBlock:
    """A residual block of the encoder, which keeps its width."""
    return ResBlock(dim)


class Downsample(nn.Module):
    """Folds blocks of positions into channels, beside a shortcut of averages.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        stride: Reduction of time, height and width.
    """

    def __init__(self, dim: int, out_dim: int, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.out_dim = out_dim
        self.conv = causal_conv(dim, out_dim // math.prod(stride))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, F, H, W), reduced; time from 1 + r n to 1 + n."""
        first = x[:, :, :1].expand(-1, -1, self.stride[0] - 1, -1, -1)
        x = torch.cat([first, x], dim=2)
        shortcut = space_to_depth(x, self.stride).unflatten(1, (self.out_dim, -1)).mean(dim=2)
        return space_to_depth(self.conv(x), self.stride) + shortcut


class Upsample(nn.Module):
    """Unfolds channels into blocks of positions, beside a shortcut that repeats them.

    Args:
        dim: Input channels.
        out_dim: Output channels.
    """

    stride: Stride = (2, 2, 2)

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        blocks = math.prod(self.stride)
        self.repeats = out_dim * blocks // dim
        self.conv = SymmetricConv3d(dim, out_dim * blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, T, h, w), enlarged; time from 1 + n to 1 + 2 n."""
        shortcut = depth_to_space(x, self.stride).repeat(1, self.repeats, 1, 1, 1)
        y = depth_to_space(self.conv(x), self.stride) + shortcut
        return y[:, :, self.stride[0] - 1 :]


class ModulatedLevel(nn.Module):
    """Modulated residual blocks of one size, after the upsampling to it.

    Args:
        dim: Channels of the blocks.
        depth: Residual blocks.
        upsample: The smallest level has none.
    """

    def __init__(self, dim: int, depth: int, upsample: Upsample | None = None) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])
        self.time_embed = TimeEmbed(4 * dim)
        self.resnets = nn.ModuleList(ResBlock(dim, is_decoder=True) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """(B, c, T, h, w), enlarged, under timesteps (B,)."""
        for upsample in self.upsamplers:
            x = upsample(x)
        temb = self.time_embed(timestep)
        for resnet in self.resnets:
            x = resnet(x, temb)
        return x


def spatial_reduction(levels: int) -> int:
    """Pixels per latent, in each direction, after the first levels of the encoder."""
    return PATCH_SIZE * math.prod(stride[1] for stride in STRIDES[:levels])


class Encoder(ClipEncoder):
    """Clip to moments, causal in time.

    Args:
        dim: Channels of the pictures.
        out_dim: Channels of the moments.
        widths: Width of each level and of the middle.
        depths: Residual blocks of the same.
    """

    def __init__(
        self, dim: int, out_dim: int, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        self.reduction = spatial_reduction(len(widths) - 1)
        self.conv_in = causal_conv(dim * PATCH_SIZE**2, widths[0])
        self.down_blocks = nn.ModuleList(
            Level(dim, dim, depth, causal_block, partial(Downsample, out_dim=out, stride=stride))
            for dim, out, depth, stride in zip(widths, widths[1:], depths, STRIDES, strict=False)
        )
        self.mid_block = Level(widths[-1], widths[-1], depths[-1], causal_block)
        self.conv_norm_out = rms_norm
        self.conv_out = causal_conv(widths[-1], out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: (B, 3, F, H, W).

        Returns:
            (B, C + 1, T, h, w).

        Raises:
            ValueError: If H or W is not a multiple of the pixels per latent.
        """
        height, width = x.shape[-2:]
        if height % self.reduction or width % self.reduction:
            raise ValueError(
                f"height and width must be multiples of {self.reduction}, got {height}x{width}"
            )
        return super().forward(patchify(x))


class Decoder(nn.Module):
    """Latents to clip under a timestep: the last step of a denoiser (arXiv:2501.00103).

    Args:
        dim: Channels of the latents.
        out_dim: Channels of the pictures.
        widths: Width of each level, from large to small pictures, and of the middle.
        depths: Residual blocks of each level, from small to large, and of the middle.
    """

    def __init__(
        self, dim: int, out_dim: int, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = SymmetricConv3d(dim, widths[0])
        self.mid_block = ModulatedLevel(widths[0], depths[-1])
        self.up_blocks = nn.ModuleList(
            ModulatedLevel(dim, depth, Upsample(previous, dim))
            for previous, dim, depth in zip(widths[:-1], widths[1:], depths[:-1], strict=True)
        )
        self.time_embed = TimeEmbed(2 * widths[-1])
        self.timestep_scale = nn.Parameter(torch.tensor(1000.0))
        self.scale_shift_table = nn.Parameter(torch.randn(2, widths[-1]))
        self.conv_out = SymmetricConv3d(widths[-1], out_dim * PATCH_SIZE**2)

    def forward(self, z: Tensor, temb: Tensor) -> Tensor:
        """Decode.

        Args:
            z: (B, C, T, h, w).
            temb: Timesteps, 0 to 1, (B,).

        Returns:
            (B, 3, F, H, W).
        """
        timestep = temb * self.timestep_scale
        x = self.mid_block(self.conv_in(z), timestep)
        for block in self.up_blocks:
            x = block(x, timestep)
        shift, scale = modulation(self.time_embed(timestep), self.scale_shift_table)
        x = rms_norm(x) * (1 + scale) + shift
        return unpatchify(self.conv_out(F.silu(x)))


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKLLTXVideo(VideoAutoencoder, ModelMixin):
    """Video autoencoder of LTX-Video (arXiv:2501.00103).

    Clips of 249 frames are 32 latent frames; longer ones are cut into tiles that share a frame of
    pixels but none of latents. Weights may hold ``shift_factors`` and ``scaling_factors``, C values
    each, which then replace the config's numbers.

    Args:
        in_channels: Channels of the pictures.
        out_channels: Channels of the reconstructions.
        down_block_types: Ignored.
        block_out_channels: Width of each encoder level and of its middle.
        layers_per_block: Residual blocks of the same.
        decoder_block_out_channels: Width of each decoder level, from large to small pictures, and
            of its middle.
        decoder_layers_per_block: Residual blocks of each decoder level and of its middle.
        act_fn: Ignored; SiLU.
        latent_channels: Channels C of the latents.
        sample_size: Size the model was trained at; informative.
        scaling_factor: Multiplier that brings latents to unit variance.
        shift_factor: Mean of the latents, subtracted before scaling.
        latents_mean: Ignored.
        latents_std: Ignored.
        patch_size: Ignored; 4.
        force_upcast: Kept in the config for pipelines: whether float16 ones decode in float32.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("LTXVideoDownBlock3D",) * 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 1024, 2048),
        layers_per_block: Sequence[int] = (4, 6, 6, 2, 2),
        decoder_block_out_channels: Sequence[int] = (128, 256, 512, 1024),
        decoder_layers_per_block: Sequence[int] = (5, 5, 5, 5),
        act_fn: str = "silu",
        latent_channels: int = 128,
        sample_size: int = 1024,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        patch_size: int = 4,
        force_upcast: bool = True,
    ) -> None:
        super().__init__(sample_min_t=249, latent_min_t=32, sample_ovr_t=1, latent_ovr_t=0)
        self.encoder = Encoder(
            in_channels, latent_channels + 1, block_out_channels, layers_per_block
        )
        self.decoder = Decoder(
            latent_channels, out_channels, decoder_block_out_channels, decoder_layers_per_block
        )
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        levels = len(block_out_channels) - 1
        self.spatial_compression_ratio = spatial_reduction(levels)
        self.temporal_compression_ratio = math.prod(stride[0] for stride in STRIDES[:levels])
        self.register_buffer("shift_factors", None)
        self.register_buffer("scaling_factors", None)
        self.register_load_state_dict_pre_hook(make_room_for_factors)

    def decode(
        self, z: Tensor, temb: Tensor | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Decode latents.

        Args:
            z: Unscaled latents, (B, C, h, w) or (B, C, T, h, w).
            temb: Timesteps, 0 to 1, (B,): how noisy the latents are; 0 when None.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``sample``: (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1.

        Raises:
            ValueError: If a shape does not fit, or the length is not legal.
        """
        temb = z.new_zeros(z.size(0)) if temb is None else temb
        if temb.shape != z.shape[:1]:
            raise ValueError(f"temb must be ({z.size(0)},), got {tuple(temb.shape)}")
        return super().decode(z, temb, return_dict=return_dict)

    def scale_(self, x: Tensor) -> Tensor:
        """Raw to model latents."""
        if self.shift_factors is None:
            return super().scale_(x)
        return (x - per_channel(self.shift_factors, x)) * per_channel(self.scaling_factors, x)

    def unscale_(self, x: Tensor) -> Tensor:
        """Model to raw latents."""
        if self.shift_factors is None:
            return super().unscale_(x)
        return x / per_channel(self.scaling_factors, x) + per_channel(self.shift_factors, x)

    def _fix_state_dict_keys_on_load(self, state_dict: OrderedDict[str, Tensor]) -> None:
        # `from_pretrained` compares keys before it loads any weight, and calls this before that.
        super()._fix_state_dict_keys_on_load(state_dict)
        make_room_for_factors(self, state_dict)


def per_channel(factors: Tensor, x: Tensor) -> Tensor:
    """C values, shaped to meet the channels of (B, C, h, w) or (B, C, T, h, w)."""
    return factors.to(x).view(-1, *(1,) * (x.ndim - 2))


def make_room_for_factors(
    model: ModelMixin, state_dict: Mapping[str, Tensor], prefix: str = "", *_: Any
) -> None:
    """Make both buffers if a checkpoint has one of them; the other is then missing."""
    given = [state_dict[prefix + name] for name in FACTORS if prefix + name in state_dict]
    if not given:
        return
    for name in FACTORS:
        room = state_dict.get(prefix + name, given[0])
        room = torch.empty_like(room, device=model.device, dtype=model.dtype)
        model.register_buffer(name, room)
