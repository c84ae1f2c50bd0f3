"""The causal video autoencoder of Open-Sora-Plan: 4x8x8 pixels to one latent.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.autoencoders.video_autoencoder import VideoAutoencoder
from diffnext.models.autoencoders.video_layers import (
    CausalConv3d,
    ClipDecoder,
    ClipEncoder,
    Conv,
    Downsample,
    FrameConv2d,
    FrameNorm,
    Level,
    ResBlock,
    Upsample,
    fold_frames,
    pointwise,
    unfold_frames,
)

__all__ = ["AutoencoderKLOpenSora"]


def conv_type(block_type: str) -> Conv:
    """The convolution of a level, from the name of its block type."""
    return FrameConv2d if "Block2D" in block_type else CausalConv3d


def group_norm(dim: int, conv: Conv) -> nn.GroupNorm:
    """Normalisation over 32 groups of channels and all positions that the convolution sees."""
    norm = FrameNorm if conv is FrameConv2d else nn.GroupNorm
    return norm(32, dim, eps=1e-6)


def res_block(conv: Conv) -> Callable[[int, int], ResBlock]:
    """Makes residual blocks of one kind of convolution."""
    return partial(ResBlock, conv=conv, norm=partial(group_norm, conv=conv))


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame.

    Args:
        dim: Channels.
        conv: Convolution of the level, which tells what the norm sees.
    """

    _from_deprecated_attn_block = True  # diffusers renames the keys of old checkpoints

    def __init__(self, dim: int, conv: Conv) -> None:
        super().__init__()
        self.group_norm = group_norm(dim, conv)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, F, H, W) to the same."""
        tokens = fold_frames(self.group_norm(x)).flatten(2).transpose(1, 2)  # (B*F, H*W, c)
        h = F.scaled_dot_product_attention(
            self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        )
        h = self.to_out[0](h[:, 0]).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + unfold_frames(h, x.size(2))


class MidBlock(Level):
    """Residual block, attention, residual block.

    Args:
        dim: Channels.
        conv: Convolution, 2-D or causal 3-D.
    """

    def __init__(self, dim: int, conv: Conv) -> None:
        super().__init__(dim, dim, 2, res_block(conv))
        self.attentions = nn.ModuleList([FrameAttention(dim, conv)])

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """(B, c, F, H, W) to the same."""
        x = self.attentions[0](self.resnets[0](x))
        return self.resnets[1](x)


class Encoder(ClipEncoder):
    """Clip to moments.

    Args:
        dim: Channels of the pictures.
        out_dim: Channels of the moments.
        block_types: Block type of each level.
        widths: Width of each level.
        depth: Residual blocks per level.
    """

    def __init__(
        self, dim: int, out_dim: int, block_types: Sequence[str], widths: Sequence[int], depth: int
    ) -> None:
        super().__init__()
        convs = [conv_type(name) for name in block_types]
        self.conv_in = FrameConv2d(dim, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            is_last = i == len(widths) - 1
            downsample = None if is_last else partial(Downsample, conv=convs[i + 1])
            before = widths[max(i - 1, 0)]
            self.down_blocks.append(Level(before, width, depth, res_block(convs[i]), downsample))
        self.mid_block = MidBlock(widths[-1], convs[-1])
        self.conv_norm_out = group_norm(widths[-1], convs[-1])
        self.conv_out = convs[-1](widths[-1], out_dim, 3, padding=1)


class Decoder(ClipDecoder):
    """Latents to clip.

    Args:
        dim: Channels of the latents.
        out_dim: Channels of the pictures.
        block_types: Block type of each level, from small to large pictures.
        widths: Width of each level, in the same order.
        depth: Residual blocks per level.
    """

    def __init__(
        self, dim: int, out_dim: int, block_types: Sequence[str], widths: Sequence[int], depth: int
    ) -> None:
        super().__init__()
        convs = [conv_type(name) for name in block_types]
        last = len(widths) - 1
        self.conv_in = convs[-1](dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], convs[-1])
        self.up_blocks = nn.ModuleList()
        for i, (width, conv) in enumerate(zip(widths, convs, strict=False)):
            has_time = conv is CausalConv3d and i < last - 1
            mode = "trilinear" if has_time else "nearest"
            upsample = partial(Upsample, conv=conv, has_time=has_time, mode=mode)
            before = widths[max(i - 1, 0)]
            block = res_block(conv)
            level = Level(before, width, depth, block, upsample=None if i == last else upsample)
            self.up_blocks.append(level)
        self.conv_norm_out = group_norm(widths[-1], convs[-1])
        self.conv_out = convs[-1](widths[-1], out_dim, 3, padding=1)


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKLOpenSora(VideoAutoencoder, ModelMixin):
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
        force_upcast: Kept in the config for pipelines: whether float16 ones decode in float32.
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
        moments = 2 * latent_channels
        self.encoder = Encoder(
            in_channels, moments, down_block_types, block_out_channels, layers_per_block
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels[::-1],
            layers_per_block + 1,
        )
        conv = conv_type(up_block_types[-1])
        self.quant_conv = pointwise(conv, moments, use_quant_conv)
        self.post_quant_conv = pointwise(conv, latent_channels, use_post_quant_conv)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        convs = [conv_type(name) for name in down_block_types[1:]]
        self.temporal_compression_ratio = 2 ** convs.count(CausalConv3d)
