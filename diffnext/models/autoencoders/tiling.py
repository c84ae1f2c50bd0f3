"""Run an autoencoder tile by tile: temporal tiles always, spatial ones on request.

Shapes: B batch, C channels, F frames, T latent frames, H W size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor

__all__ = ["SpatialTiles", "Tile", "TilingMixin", "run_in_spatial_tiles"]


@dataclass(frozen=True)
class Tile:
    """A run of frames that goes through a network at once.

    Attributes:
        start: First frame of the input.
        end: Frame behind the last one.
        drop: Leading frames of the output that repeat the end of the tile before.
    """

    start: int
    end: int
    drop: int


@dataclass(frozen=True)
class SpatialTiles:
    """Sizes of spatial tiles.

    Attributes:
        height: Pixels.
        width: Pixels.
        overlap: Share of a tile that it has in common with the next one, 0 to 1.
    """

    height: int = 256
    width: int = 256
    overlap: float = 0.25


class TilingMixin(AutoencoderMixin):
    """Temporal and spatial tiling of a video autoencoder's ``encoder`` and ``decoder``.

    Videos longer than one tile are always cut in time: that is how the models were trained.
    The last tile may be shorter; no frame is lost. A tile sees nothing of its neighbours but the
    frames they share. Spatial tiles save memory and are blended: results differ slightly.

    Args:
        sample_min_t: Frames of a tile.
        latent_min_t: Latent frames of a tile.
        sample_ovr_t: Frames that neighbouring tiles share.
        latent_ovr_t: Latent frames that neighbouring tiles share.
    """

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
        self.use_slicing = False
        self.use_tiling = False
        self.spatial_tiles = SpatialTiles()

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames a latent frame stands for, but the first, which stands for one."""
        return (self.sample_min_t - 1) // (self.latent_min_t - 1)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels a latent stands for, in each direction."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor: float | None = None,
    ) -> None:
        """Cut large pictures into overlapping spatial tiles, to save memory.

        Args:
            tile_sample_min_height: Height of a tile in pixels; 256 when None.
            tile_sample_min_width: Width of a tile in pixels; 256 when None.
            tile_overlap_factor: Share of a tile common with the next one; a quarter when None.

        Raises:
            ValueError: If a tile is no positive multiple of the compression ratio, or the overlap
                leaves nothing new.
        """
        default = SpatialTiles()
        overlap = default.overlap if tile_overlap_factor is None else tile_overlap_factor
        tiles = SpatialTiles(
            default.height if tile_sample_min_height is None else tile_sample_min_height,
            default.width if tile_sample_min_width is None else tile_sample_min_width,
            overlap,
        )
        ratio = self.spatial_compression_ratio
        if any(side < 1 or side % ratio for side in (tiles.height, tiles.width)):
            raise ValueError(
                f"tiles must be positive multiples of {ratio} pixels, "
                f"got {tiles.height}x{tiles.width}"
            )
        if not 0 <= overlap < 1:
            raise ValueError(f"tile_overlap_factor must be at least 0 and below 1, got {overlap}")
        self.spatial_tiles = tiles
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
        if x.ndim == 4:
            return self._encode_tile(x)
        tiles = self.sample_tiles(x.size(2))
        parts = [self._encode_tile(x[:, :, tile.start : tile.end]) for tile in tiles]
        return torch.cat([y[:, :, t.drop :] for y, t in zip(parts, tiles, strict=True)], dim=2)

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
        if x.ndim == 4:
            return self._decode_tile(x, *args)
        tiles = self.latent_tiles(x.size(2))
        parts = [self._decode_tile(x[:, :, tile.start : tile.end], *args) for tile in tiles]
        return torch.cat([y[:, :, t.drop :] for y, t in zip(parts, tiles, strict=True)], dim=2)

    def _encode_tile(self, x: Tensor) -> Tensor:
        tiles = self.spatial_tiles
        if not self.use_tiling or fits(x, (tiles.height, tiles.width)):
            return self.encoder(x)
        ratio = self.spatial_compression_ratio
        if x.size(-2) % ratio or x.size(-1) % ratio:
            raise ValueError(
                f"sizes must be multiples of {ratio} to be tiled, got {tuple(x.shape[-2:])}"
            )
        return run_in_spatial_tiles(
            self.encoder, x, (tiles.height, tiles.width), tiles.overlap, unit=ratio
        )

    def _decode_tile(self, z: Tensor, *args: Any) -> Tensor:
        if not self.use_tiling:
            return self.decoder(z, *args)
        ratio = self.spatial_compression_ratio
        size = (self.spatial_tiles.height // ratio, self.spatial_tiles.width // ratio)
        if fits(z, size):
            return self.decoder(z, *args)
        return run_in_spatial_tiles(
            lambda tile: self.decoder(tile, *args), z, size, self.spatial_tiles.overlap
        )

    def _is_legal_sample(self, num_frames: int) -> bool:
        return num_frames >= 1 and (num_frames - 1) % self.temporal_compression_ratio == 0

    def _is_legal_latent(self, num_latents: int) -> bool:
        """Whether the last tile adds frames to those of the tile before."""
        if num_latents <= self.latent_min_t:
            return num_latents >= 1
        stride = self.latent_min_t - self.latent_ovr_t
        last = (num_latents - self.latent_ovr_t - 1) % stride + 1 + self.latent_ovr_t
        return (last - 1) * self.temporal_compression_ratio + 1 > self.sample_ovr_t

    def _check_length(self, what: str, length: int, is_legal: Callable[[int], bool]) -> None:
        if is_legal(length):
            return
        nearest = [next(filter(is_legal, range(max(length, 1), 0, -1)), None)]
        nearest.append(
            next(filter(is_legal, range(max(length, 1), length + self.sample_min_t + 2)))
        )
        names = " or ".join(str(n) for n in dict.fromkeys(nearest) if n is not None)
        raise ValueError(
            f"{type(self).__name__} cannot take {length} {what}: "
            f"the nearest legal number is {names}"
        )


def plan_tiles(length: int, size: int, overlap: int, drop: int) -> list[Tile]:
    """Cover ``length`` frames by tiles of ``size``, neighbours sharing ``overlap``."""
    starts = range(0, max(length - overlap, 1), size - overlap)
    return [Tile(start, min(start + size, length), drop if start else 0) for start in starts]


def fits(x: Tensor, size: tuple[int, int]) -> bool:
    """Whether the last two dimensions are within ``size``."""
    return x.size(-2) <= size[0] and x.size(-1) <= size[1]


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
    result = None
    weights = None
    for top in tile_starts(x.size(-2), size[0], overlap, unit):
        for left in tile_starts(x.size(-1), size[1], overlap, unit):
            tile = x[..., top : top + size[0], left : left + size[1]]
            y = run(tile)
            # The same factor maps sizes and positions of the input to those of the output.
            height, first_row = (n * y.size(-2) // tile.size(-2) for n in (x.size(-2), top))
            width, first_column = (n * y.size(-1) // tile.size(-1) for n in (x.size(-1), left))
            if result is None:
                result = y.new_zeros(*y.shape[:-2], height, width)
                weights = y.new_zeros(height, width, dtype=torch.float32)
            rows = slice(first_row, first_row + y.size(-2))
            columns = slice(first_column, first_column + y.size(-1))
            fade = torch.outer(
                fade_weights(y.size(-2), overlap), fade_weights(y.size(-1), overlap)
            ).to(weights)
            result[..., rows, columns] += y * fade.to(y.dtype)
            weights[rows, columns] += fade
    return result / weights.to(result.dtype)


def tile_starts(length: int, size: int, overlap: float, unit: int) -> list[int]:
    """Where tiles begin so that they cover ``length``; the last one ends with it."""
    if length <= size:
        return [0]
    stride = max(round(size * (1 - overlap)) // unit, 1) * unit
    return [*range(0, length - size, stride), length - size]


def fade_weights(size: int, overlap: float) -> Tensor:
    """Weights that rise from and fall to the edges over the overlap, (size,)."""
    ramp = torch.arange(1, size + 1, dtype=torch.float32) / (round(size * overlap) + 1)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)
