"""Latents and text states of examples.

Shapes: B examples, C latent channels, T latent frames, h w latent size, F frames, H W pixels,
n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.settings import CacheSettings, format_size
from diffnext.models.autoencoders.loading import find_autoencoder, load_autoencoder
from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.utils.component_files import component_files

TEXT_COMPONENTS = ("text_encoder", "tokenizer")


class LatentEncoder:
    """The autoencoder of a build.

    Args:
        settings: Of the build.

    Raises:
        CacheError: If there is no autoencoder, or sizes or frames do not suit it.
    """

    def __init__(self, settings: CacheSettings) -> None:
        dtype = getattr(torch, settings.dtype)
        try:
            self.vae = load_autoencoder(settings.vae, dtype, settings.device)
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"vae: {error}") from error
        self._check_frames(settings)
        self._check_sizes(settings)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Moments of pictures or clips of one size, as they are stored.

        Args:
            pixels: B pictures (H, W, 3), or clips (F, H, W, 3), uint8.

        Returns:
            B arrays (2C, h, w), or (2C, T, h, w), float16; not finite where float16, or the dtype
            that was computed in, does not reach.
        """
        x = torch.from_numpy(np.stack(pixels)).to(self.vae.device).to(self.vae.dtype)
        x = x.movedim(-1, 1).sub(127.5).div(127.5)
        moments = self.vae.encode(x).latent_dist.parameters
        return list(moments.half().cpu().numpy())

    def _check_frames(self, settings: CacheSettings) -> None:
        if settings.kind == "images":
            return
        if not hasattr(self.vae, "latent_length"):
            raise CacheError(f"vae: {type(self.vae).__name__} encodes no videos")
        try:
            self.vae.latent_length(settings.frames.num_frames)
        except ValueError as error:
            raise CacheError(f"num_frames: {error}") from error

    def _check_sizes(self, settings: CacheSettings) -> None:
        ratio = getattr(self.vae, "spatial_compression_ratio", None)
        ratio = ratio or 2 ** (len(self.vae.config.block_out_channels) - 1)
        for size in settings.sizes:
            if size[0] % ratio or size[1] % ratio:
                raise CacheError(
                    f"sizes must be multiples of {ratio} pixels, which become one latent; "
                    f"got {format_size(size)}"
                )


class TextStates:
    """The text encoder of a build.

    Args:
        folder: Release folder.
        settings: Of the build.

    Raises:
        CacheError: If the folder has no text encoder and tokenizer.
    """

    def __init__(self, folder: Path, settings: CacheSettings) -> None:
        from transformers import AutoTokenizer

        from diffnext.models.text_encoders.phi import PhiEncoderModel

        for name in TEXT_COMPONENTS:
            if not (folder / name).is_dir():
                raise CacheError(f"text_encoder: {folder} has no folder {name}")
        folders = [str(folder / name) for name in TEXT_COMPONENTS]
        dtype = getattr(torch, settings.dtype)
        try:
            for path in folders:
                component_files(Path(path))
            model = PhiEncoderModel.from_pretrained(folders[0], dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(folders[1], trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"text_encoder: {error}") from error
        self.model = model.eval().requires_grad_(False).to(settings.device)
        self.length = settings.text_length
        self.width = self.model.config.hidden_size

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """States of texts: arrays (n, D), float16."""
        states = encode_texts(self.tokenizer, self.model, texts, self.length, self.width)
        return [state.half().cpu().numpy() for state in states]


def vae_folder(settings: CacheSettings) -> Path:
    """The folder of the autoencoder itself.

    Raises:
        CacheError: If there is none.
    """
    try:
        return find_autoencoder(settings.vae)
    except (OSError, ValueError) as error:
        raise CacheError(f"vae: {error}") from error


def pack_states(states: np.ndarray | None) -> dict[str, Any]:
    """Text states as a record holds them; None is an absent short caption."""
    if states is None:
        return {"data": b"", "shape": []}
    return {"data": states.tobytes(), "shape": list(states.shape)}
