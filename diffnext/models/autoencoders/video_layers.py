"""Layers that the video autoencoders share.

Shapes: B batch, c channels, C latent channels, F frames, T latent frames, H W size. Every layer
takes and gives videos, (B, c, F, H, W); two-dimensional ones see their frames as a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CausalConv3d",
    "ClipDecoder",
    "ClipEncoder",
    "Downsample",
    "FrameConv2d",
    "FrameNorm",
    "Level",
    "ResBlock",
    "Upsample",
    "fold_frames",
    "pointwise",
    "unfold_frames",
]

# Larger inputs are convolved in temporal chunks: kernels index with 32 bits.
_MAX_ELEMENTS = 2**30


def fold_frames(x: Tensor) -> Tensor:
    """Frames into the batch: (B, c, F, H, W) to (B*F, c, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """Frames out of the batch: (B*F, c, H, W) to (B, c, F, H, W)."""
    return x.unflatten(0, (-1, num_frames)).transpose(1, 2)


class FrameConv2d(nn.Conv2d):
    """2-D convolution of each frame."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, c, F, H, W)."""
        return unfold_frames(super().forward(fold_frames(x)), x.size(2))


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, c, F, H, W)."""
        return unfold_frames(super().forward(fold_frames(x)), x.size(2))


class CausalConv3d(nn.Conv3d):
    """3-D convolution in which a frame sees itself and earlier frames only.

    The first frame is repeated in front of the clip; space is padded with zeros.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Size along (time, height, width), or all of them.
        stride: Stride of all dimensions.
        padding: Zeros around height and width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=(0, padding, padding)
        )
        self.num_earlier = self.kernel_size[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, c, F, H, W); F frames stay F with a temporal stride of 1."""
        if self.num_earlier:
            first = x[:, :, :1].expand(-1, -1, self.num_earlier, -1, -1)
            x = torch.cat([first, x], dim=2)
        num_chunks = x.numel() // _MAX_ELEMENTS + 1
        if num_chunks == 1 or self.stride[0] > 1:
            return super().forward(x)
        # The same result from temporal chunks, each preceded by the frames its kernel reaches.
        num_outputs = x.size(2) - self.num_earlier
        length = -(-num_outputs // num_chunks)
        chunks = (x[:, :, i : i + length + self.num_earlier] for i in range(0, num_outputs, length))
        return torch.cat([super(CausalConv3d, self).forward(chunk) for chunk in chunks], dim=2)


Conv = type[FrameConv2d] | type[CausalConv3d]


def pointwise(conv: Conv, dim: int, is_used: bool) -> nn.Module:
    """A convolution of size 1 from ``dim`` to ``dim`` channels, or nothing."""
    return conv(dim, dim, 1) if is_used else nn.Identity()


class ResBlock(nn.Module):
    """Residual block of two convolutions.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        conv: Class of the convolutions.
        norm: Makes the norm of a number of channels.
    """

    def __init__(
        self, dim: int, out_dim: int, conv: Conv, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.conv1 = conv(dim, out_dim, 3, padding=1)
        self.norm2 = norm(out_dim)
        self.conv2 = conv(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == out_dim else conv(dim, out_dim, 1)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """(B, dim, F, H, W) to (B, out_dim, F, H, W); the norms also take the condition."""
        h = self.conv1(F.silu(self.norm1(x, *condition)))
        h = self.conv2(F.silu(self.norm2(h, *condition)))
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """Halves the size, as its convolution does, and before it the time if asked to.

    Args:
        dim: Channels.
        conv: Class of the convolution; a causal one also halves time.
        has_time: Whether pairs of frames after the first are averaged: 1 + 2 n frames to 1 + n.
    """

    def __init__(self, dim: int, conv: Conv, has_time: bool = False) -> None:
        super().__init__()
        self.has_time = has_time
        self.conv = conv(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, F, H, W), reduced."""
        if self.has_time and x.size(2) > 1:
            pairs = x[:, :, 1:].unflatten(2, (-1, 2)).mean(dim=3)
            x = torch.cat([x[:, :, :1], pairs], dim=2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size, and time if asked to; the first frame stays one: T to 1 + 2 (T - 1).

    Args:
        dim: Channels.
        conv: Class of the convolution after the interpolation; over time only where time doubles.
        has_time: Whether time is doubled.
        mode: Kind of interpolation.
    """

    def __init__(self, dim: int, conv: Conv, has_time: bool, mode: str = "nearest") -> None:
        super().__init__()
        self.has_time = has_time
        self.mode = mode
        if conv is CausalConv3d and not has_time:
            self.conv: nn.Module = CausalConv3d(dim, dim, (1, 3, 3), padding=1)
        else:
            self.conv = conv(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T, h, w), enlarged."""
        if not self.has_time or x.size(2) == 1:
            return self.conv(self._interpolate(x, 1.0))
        parts = [self._interpolate(x[:, :, :1], 1.0), self._interpolate(x[:, :, 1:], 2.0)]
        return self.conv(torch.cat(parts, dim=2))

    def _interpolate(self, x: Tensor, time: float) -> Tensor:
        return F.interpolate(x, scale_factor=(time, 2.0, 2.0), mode=self.mode)


class Level(nn.Module):
    """Residual blocks of one size, followed by a change of size.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        depth: Number of blocks.
        block: Makes a block of its input and output channels.
        downsample: Makes the module that reduces the output; the last level of an encoder has none.
        upsample: Makes the module that enlarges it; the last level of a decoder has none.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        depth: int,
        block: Callable[[int, int], nn.Module],
        downsample: Callable[[int], nn.Module] | None = None,
        upsample: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(block(out_dim if i else dim, out_dim) for i in range(depth))
        self.downsamplers = nn.ModuleList([] if downsample is None else [downsample(out_dim)])
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample(out_dim)])

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """(B, c, F, H, W), at another size; the blocks also take the condition."""
        for resnet in self.resnets:
            x = resnet(x, *condition)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class ClipEncoder(nn.Module):
    """Runs a clip through an encoder; subclasses provide the parts."""

    conv_in: nn.Module
    down_blocks: nn.ModuleList
    mid_block: nn.Module
    conv_norm_out: Callable[..., Tensor]
    conv_out: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, F, H, W) to (B, 2C, T, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class ClipDecoder(nn.Module):
    """Runs latents through a decoder; subclasses provide the parts.

    Attributes:
        sees_latents: Whether all blocks and norms also take the latents.
    """

    sees_latents = False
    conv_in: nn.Module
    mid_block: nn.Module
    up_blocks: nn.ModuleList
    conv_norm_out: Callable[..., Tensor]
    conv_out: nn.Module

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T, h, w) to (B, 3, F, H, W)."""
        condition = (z,) if self.sees_latents else ()
        x = self.mid_block(self.conv_in(z), *condition)
        for block in self.up_blocks:
            x = block(x, *condition)
        return self.conv_out(F.silu(self.conv_norm_out(x, *condition)))
