"""Motion strength: how much moves in a clip, as one number.

Shapes: F frames, H W pixels, h w size of the reduced frames.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SHORT_SIDE = 64  # pixels of the frames that motion is looked for in
LEVELS = 4
STEPS = 2  # refinements a level
MAX_PAIRS = 16  # of neighbouring frames, spread over the clip
WINDOW = 7  # pixels that are taken to move alike
DAMPING = 1e-3  # squared slope, of pixels from 0 to 1, below which nothing is seen to move


def estimate_flow(frames: np.ndarray) -> float:
    """Mean length of the optical flow from one frame to the next.

    A dense pyramidal Lucas-Kanade estimate on reduced grey frames (Lucas and Kanade, 1981): each
    window's shift is the least-squares solution of the brightness constancy equation, found coarse
    to fine. Flat regions do not count as moving.

    Args:
        frames: (F, H, W, 3), uint8.

    Returns:
        Hundredths of the frame's short side that the average pixel moves between two frames; 0 for
        a single frame. It is independent of the resolution.
    """
    if len(frames) < 2:
        return 0.0
    pairs = min(len(frames) - 1, MAX_PAIRS)
    starts = np.linspace(0, len(frames) - 2, pairs).round().astype(int)
    grey = _reduce(frames[np.stack([starts, starts + 1]).ravel()])
    flow = _track(grey[:pairs], grey[pairs:])
    return 100 * flow.norm(dim=1).mean().item() / min(grey.shape[-2:])


def _reduce(frames: np.ndarray) -> Tensor:
    """Grey frames of the short side, (F, 1, h, w), 0 to 1."""
    height, width = frames.shape[1:3]
    scale = min(1.0, SHORT_SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(np.ascontiguousarray(frame)).convert("L") for frame in frames]
    small = [picture.resize(size, Image.Resampling.BOX) for picture in pictures]
    grey = np.stack([np.asarray(picture) for picture in small])
    return torch.from_numpy(grey)[:, None].float() / 255


def _track(first: Tensor, second: Tensor) -> Tensor:
    """Flow of each pixel of ``first`` (B, 1, h, w) to ``second``: (B, 2, h, w) of x and y."""
    pyramid = [(first, second)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * WINDOW:
        a, b = pyramid[-1]
        pyramid.append((F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)))
    flow = torch.zeros(len(first), 2, *pyramid[-1][0].shape[-2:])
    for a, b in reversed(pyramid):
        size = a.shape[-2:]
        ratio = torch.tensor([size[1] / flow.size(3), size[0] / flow.size(2)]).view(1, 2, 1, 1)
        flow = F.interpolate(flow, size, mode="bilinear", align_corners=False) * ratio
        for _ in range(STEPS):
            flow = flow + _shift(a, _warp(b, flow))
    return flow


def _shift(a: Tensor, b: Tensor) -> Tensor:
    """Least-squares shift of each window from ``a`` to ``b``, at most a pixel: (B, 2, h, w)."""
    padded = F.pad(a, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    t = b - a
    products = torch.cat([x * x, x * y, y * y, x * t, y * t], dim=1)
    sums = F.avg_pool2d(products, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    xx, xy, yy, xt, yt = sums.unsqueeze(2).unbind(1)
    xx = xx + DAMPING
    yy = yy + DAMPING
    determinant = xx * yy - xy * xy
    shift = torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant
    return shift.clamp(-1, 1)


def _warp(x: Tensor, flow: Tensor) -> Tensor:
    """``x`` (B, 1, h, w) read where ``flow`` points to."""
    h, w = x.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at_x = (columns + flow[:, 0] + 0.5) * 2 / w - 1
    at_y = (rows + flow[:, 1] + 0.5) * 2 / h - 1
    grid = torch.stack([at_x, at_y], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
