"""Layers that the causal video autoencoders share.

Shapes: B batch, C channels, F frames, H W size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CausalConv3d", "apply_per_frame", "fold_frames", "unfold_frames"]

# Larger inputs are convolved in temporal chunks: kernels index with 32 bits.
_MAX_ELEMENTS = 2**30


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
        """Convolve (B, C, F, H, W); F frames stay F with a temporal stride of 1."""
        if self.num_earlier:
            first = x[:, :, :1].expand(-1, -1, self.num_earlier, -1, -1)
            x = torch.cat([first, x], dim=2)
        num_chunks = x.numel() // _MAX_ELEMENTS + 1
        if num_chunks == 1 or self.stride[0] > 1:
            return super().forward(x)
        return self._forward_chunked(x, num_chunks)

    def _forward_chunked(self, x: Tensor, num_chunks: int) -> Tensor:
        """The same result from temporal chunks, each behind the frames its kernel reaches."""
        num_outputs = x.size(2) - self.num_earlier
        length = -(-num_outputs // num_chunks)
        spans = [(s, min(s + length, num_outputs)) for s in range(0, num_outputs, length)]
        outputs = [
            super(CausalConv3d, self).forward(x[:, :, start : end + self.num_earlier])
            for start, end in spans
        ]
        return torch.cat(outputs, dim=2)


def fold_frames(x: Tensor) -> Tensor:
    """Frames into the batch: (B, C, F, H, W) to (B*F, C, H, W); pictures stay."""
    return x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """Frames out of the batch: (B*F, C, H, W) to (B, C, F, H, W); videos stay."""
    return x if x.ndim == 5 else x.unflatten(0, (-1, num_frames)).transpose(1, 2)


def apply_per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer to a video (B, C, F, H, W); a 2-D convolution sees frames as a batch."""
    if isinstance(layer, nn.Conv2d):
        return unfold_frames(layer(fold_frames(x)), x.size(2))
    return layer(x)
