"""Run an autoencoder tile by tile: temporal tiles always, spatial ones on request.

Shapes: B batch, C channels, F frames, T latent frames, H W size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor

__all__ = ["Tile", "TilingMixin", "run_in_spatial_tiles"]


@dataclass(frozen=True)
class Tile:
    """A run of frames that goes through a network at once.

    Attributes:
        start: First frame of the input.
        end: The frame after the last one.
        drop: Leading frames of the output that repeat the end of the previous tile.
    """

    start: int
    end: int
    drop: int


class TilingMixin(AutoencoderMixin):
    """Temporal and spatial tiling of a video autoencoder's ``encoder`` and ``decoder``.

    Videos longer than one tile are always cut in time: that is how the models were trained.
    The last tile may be shorter; no frame is lost. Of its neighbours, a tile sees only the shared
    frames. Spatial tiles save memory and are blended: results differ slightly.

    Args:
        sample_min_t: Frames of a tile.
        latent_min_t: Latent frames of a tile.
        sample_ovr_t: Frames that neighbouring tiles share.
        latent_ovr_t: Latent frames that neighbouring tiles share.

    Attributes:
        temporal_compression_ratio: Frames per latent frame; the first latent frame is one frame.
        spatial_compression_ratio: Pixels per latent, in each direction.
    """

    encoder: Callable[..., Tensor]
    decoder: Callable[..., Tensor]
    spatial_compression_ratio = 1

    def __init__(
        self,
        sample_min_t: int = 17,
        latent_min_t: int = 5,
        sample_ovr_t: int = 1,
        latent_ovr_t: int = 0,
    ) -> None:
        super().__init__()
        self.sample_min_t = sample_min_t
        self.latent_min_t = latent_min_t
        self.sample_ovr_t = sample_ovr_t
        self.latent_ovr_t = latent_ovr_t
        self.temporal_compression_ratio = (sample_min_t - 1) // (latent_min_t - 1)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = (256, 256)
        self.tile_overlap_factor = 0.25

    def enable_tiling(
        self,
        tile_sample_min_height: int = 256,
        tile_sample_min_width: int = 256,
        tile_overlap_factor: float = 0.25,
    ) -> None:
        """Cut large pictures into overlapping spatial tiles, to save memory.

        Args:
            tile_sample_min_height: Height of a tile in pixels.
            tile_sample_min_width: Width of a tile in pixels.
            tile_overlap_factor: Share of a tile common with the next one.

        Raises:
            ValueError: If a side of a tile is not a positive multiple of the compression ratio, or
                the overlap leaves nothing new.
        """
        ratio = self.spatial_compression_ratio
        size = (tile_sample_min_height, tile_sample_min_width)
        if any(not isinstance(side, int) or side < 1 or side % ratio for side in size):
            raise ValueError(
                f"tiles must be positive multiples of {ratio} pixels, got {size[0]}x{size[1]}"
            )
        if not 0 <= tile_overlap_factor < 1:
            raise ValueError(
                f"tile_overlap_factor must be at least 0 and below 1, got {tile_overlap_factor}"
            )
        self.tile_sample_min_size = size
        self.tile_overlap_factor = tile_overlap_factor
        super().enable_tiling()

    def sample_tiles(self, num_frames: int) -> list[Tile]:
        """The tiles that a video is encoded in.

        Raises:
            ValueError: If the length is not legal; the message names the nearest legal ones.
        """
        self._check_length("frames", num_frames, self._is_legal_sample)
        return plan_tiles(num_frames, self.sample_min_t, self.sample_ovr_t, self.latent_ovr_t)

    def latent_tiles(self, num_latents: int) -> list[Tile]:
        """The tiles that latent frames are decoded in.

        Raises:
            ValueError: If the length is not legal; the message names the nearest legal ones.
        """
        self._check_length("latent frames", num_latents, self._is_legal_latent)
        return plan_tiles(num_latents, self.latent_min_t, self.latent_ovr_t, self.sample_ovr_t)

    def latent_length(self, num_frames: int) -> int:
        """Latent frames T that F frames are encoded to."""
        ratio = self.temporal_compression_ratio
        tiles = self.sample_tiles(num_frames)
        return sum((tile.end - tile.start - 1) // ratio + 1 - tile.drop for tile in tiles)

    def sample_length(self, num_latents: int) -> int:
        """Frames F that T latent frames are decoded to."""
        ratio = self.temporal_compression_ratio
        tiles = self.latent_tiles(num_latents)
        return sum((tile.end - tile.start - 1) * ratio + 1 - tile.drop for tile in tiles)

    def legal_latent_length(self, num_latents: int) -> int:
        """The largest legal number of latent frames that is not above ``num_latents``."""
        return next(filter(self._is_legal_latent, range(num_latents, 0, -1)))

    def tiled_encoder(self, x: Tensor) -> Tensor:
        """Encode in temporal tiles.

        Args:
            x: Pictures (B, 3, H, W), which are one tile, or videos (B, 3, F, H, W).

        Returns:
            What the encoder makes of the tiles, end to end.

        Raises:
            ValueError: If the length is not legal.
        """
        run = partial(self._run_tile, self.encoder, self.spatial_compression_ratio)
        return run(x) if x.ndim == 4 else run_in_time(run, x, self.sample_tiles(x.size(2)))

    def tiled_decoder(self, x: Tensor, *args: Any) -> Tensor:
        """Decode in temporal tiles.

        Args:
            x: Latents of pictures (B, C, h, w), which are one tile, or videos (B, C, T, h, w).
            *args: Further arguments of the decoder.

        Returns:
            What the decoder makes of the tiles, end to end.

        Raises:
            ValueError: If the length is not legal.
        """
        run = partial(self._run_tile, lambda tile: self.decoder(tile, *args), 1)
        return run(x) if x.ndim == 4 else run_in_time(run, x, self.latent_tiles(x.size(2)))

    def _run_tile(self, run: Callable[[Tensor], Tensor], unit: int, x: Tensor) -> Tensor:
        """Run a network on a temporal tile, in spatial ones if they are enabled and it is larger.

        Args:
            run: The network.
            unit: Positions of its input per latent, in each direction.
            x: The tile, (..., H, W).
        """
        if not self.use_tiling:
            return run(x)
        height, width = (
            n * unit // self.spatial_compression_ratio for n in self.tile_sample_min_size
        )
        if x.size(-2) <= height and x.size(-1) <= width:
            return run(x)
        if x.size(-2) % unit or x.size(-1) % unit:
            raise ValueError(
                f"sizes must be multiples of {unit} to be tiled, got {tuple(x.shape[-2:])}"
            )
        return run_in_spatial_tiles(run, x, (height, width), self.tile_overlap_factor, unit)

    def _is_legal_sample(self, num_frames: int) -> bool:
        return num_frames >= 1 and (num_frames - 1) % self.temporal_compression_ratio == 0

    def _is_legal_latent(self, num_latents: int) -> bool:
        """Whether the last tile adds frames to the previous one."""
        tiles = plan_tiles(num_latents, self.latent_min_t, self.latent_ovr_t, self.sample_ovr_t)
        frames = (tiles[-1].end - tiles[-1].start - 1) * self.temporal_compression_ratio + 1
        return num_latents >= 1 and frames > tiles[-1].drop

    def _check_length(self, what: str, length: int, is_legal: Callable[[int], bool]) -> None:
        if is_legal(length):
            return
        below = next(filter(is_legal, range(length, 0, -1)), None)
        above = next(filter(is_legal, count(max(length, 1))))
        names = f"{above}" if below is None else f"{below} or {above}"
        raise ValueError(
            f"{type(self).__name__} cannot take {length} {what}: "
            f"the nearest legal number is {names}"
        )


def run_in_time(run: Callable[[Tensor], Tensor], x: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """Run a network on temporal tiles of a video (B, c, F, H, W); its outputs, end to end."""
    parts = [run(x[:, :, tile.start : tile.end])[:, :, tile.drop :] for tile in tiles]
    return torch.cat(parts, dim=2)


def plan_tiles(length: int, size: int, overlap: int, drop: int) -> list[Tile]:
    """Cover ``length`` frames by tiles of ``size``, neighbours sharing ``overlap``."""
    starts = range(0, max(length - overlap, 1), size - overlap)
    return [Tile(start, min(start + size, length), drop if start else 0) for start in starts]


def run_in_spatial_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    size: tuple[int, int],
    overlap: float,
    unit: int = 1,
) -> Tensor:
    """Run a network on overlapping tiles and cross-fade its outputs.

    Args:
        run: Maps a tile (..., h, w) to an output that is larger or smaller by a fixed factor.
        x: Input, (..., H, W).
        size: Height and width of a tile.
        overlap: Share of a tile common with the next one.
        unit: Tiles begin at multiples of this.

    Returns:
        The output for all of ``x``.
    """
    result = weights = x.new_zeros(0)  # sized by the first output
    for top in tile_starts(x.size(-2), size[0], overlap, unit):
        for left in tile_starts(x.size(-1), size[1], overlap, unit):
            tile = x[..., top : top + size[0], left : left + size[1]]
            y = run(tile)
            # The same factor maps sizes and positions from input to output.
            height, first_row = (n * y.size(-2) // tile.size(-2) for n in (x.size(-2), top))
            width, first_column = (n * y.size(-1) // tile.size(-1) for n in (x.size(-1), left))
            if not len(result):
                result = y.new_zeros(*y.shape[:-2], height, width)
                weights = y.new_zeros(height, width, dtype=torch.float32)
            rows = slice(first_row, first_row + y.size(-2))
            columns = slice(first_column, first_column + y.size(-1))
            fade = torch.outer(*(fade_weights(n, overlap, y.device) for n in y.shape[-2:]))
            result[..., rows, columns] += y * fade.to(y.dtype)
            weights[rows, columns] += fade
    return result / weights.to(result.dtype)


def tile_starts(length: int, size: int, overlap: float, unit: int) -> list[int]:
    """Where tiles begin so that they cover ``length``; the last one ends with it."""
    if length <= size:
        return [0]
    stride = max(round(size * (1 - overlap)) // unit, 1) * unit
    return [*range(0, length - size, stride), length - size]


def fade_weights(size: int, overlap: float, device: torch.device) -> Tensor:
    """Weights that rise from and fall to the edges over the overlap, (size,), float32."""
    ramp = torch.arange(1, size + 1, dtype=torch.float32, device=device) / (
        round(size * overlap) + 1
    )
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)
