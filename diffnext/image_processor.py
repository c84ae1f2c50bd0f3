"""From latents to pictures.

Shapes: B batch, C latent channels, T latent frames, h w latent size, F frames, H W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from torch import Tensor

__all__ = ["OUTPUT_TYPES", "VaeImageProcessor"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VaeImageProcessor(ConfigMixin):
    """Decodes latents and converts pixels."""

    config_name = "image_processor_config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    @torch.no_grad()
    def decode_latents(vae: Any, latents: Tensor, vae_batch_size: int = 1) -> Tensor:
        """Decode a batch in chunks.

        Args:
            vae: The autoencoder.
            latents: Scaled latents, (B, C, h, w) or (B, C, T, h, w).
            vae_batch_size: Samples decoded at once.

        Returns:
            Pixels, (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1.

        Raises:
            ValueError: If ``vae_batch_size`` is not positive.
        """
        if vae_batch_size < 1:
            raise ValueError(f"vae_batch_size must be at least 1, got {vae_batch_size}")
        chunks = vae.unscale_(latents).split(vae_batch_size)
        return torch.cat([vae.decode(chunk).sample for chunk in chunks])

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """Pixels (B, 3, ..., H, W) from -1..1 to uint8 (B, ..., H, W, 3), truncated."""
        scaled = (images.float() * 127.5 + 127.5).clamp(0, 255)
        return scaled.to(torch.uint8).movedim(1, -1).cpu().numpy()

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """uint8 pictures (B, H, W, 3), or one (H, W, 3), to PIL."""
        images = images[None] if images.ndim == 3 else images
        return [Image.fromarray(image) for image in images]

    def postprocess(self, image: Tensor, output_type: str = "pil") -> Any:
        """Convert decoded pixels.

        Args:
            image: Pixels, (B, 3, H, W), or of a video, (B, 3, F, H, W).
            output_type: "pt" and "latent" leave them as they are (-1 to 1); "np" gives uint8
                with channels last; "pil" a list of pictures, for videos as "np".

        Raises:
            ValueError: If the type is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if output_type in ("pt", "latent"):
            return image
        array = self.pt_to_numpy(image)
        return self.numpy_to_pil(array) if output_type == "pil" and array.ndim == 4 else array
