"""From pictures to what the autoencoder reads, and from latents to pictures.

Shapes: B batch, C latent channels, T latent frames, h w latent size, F frames, H W pixels.
"""

from __future__ import annotations

from typing import Any

import diffusers.image_processor
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["OUTPUT_TYPES", "RESIZE_MODES", "VaeImageProcessor"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# As in diffusers: cover the size and cut the rest, fit into it on a blurred border, distort.
RESIZE_MODES = ("crop", "fill", "default")


class VaeImageProcessor(ConfigMixin):
    """Encodes pictures as pixels, decodes latents and converts pixels."""

    config_name = "image_processor_config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()

    def preprocess(self, image: Any, height: int, width: int, resize_mode: str = "crop") -> Tensor:
        """Pictures as pixels for the autoencoder.

        Args:
            image: A picture or several: PIL images, arrays (H, W), (H, W, c) or (B, H, W, c),
                tensors (c, H, W) or (B, c, H, W), or a list of those. Integers are 0 to 255,
                floating-point values 0 to 255, 0 to 1 or -1 to 1, told apart by their range.
                The EXIF orientation is applied, transparency laid on white, grey made RGB.
            height: Height of the result; pictures of exactly this size stay as they are.
            width: Its width.
            resize_mode: "crop" scales a picture to cover the size and cuts what stands over,
                "fill" fits it into the size on a blurred border, "default" distorts it.

        Returns:
            (B, 3, height, width), float32, -1 to 1.

        Raises:
            ValueError: If it is no picture or the mode is unknown.
        """
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, got {resize_mode!r}")
        pictures = [as_pixels(picture) for picture in split_pictures(image)]
        resized = [
            picture
            if picture.shape[-2:] == (height, width)
            else resize(picture, height, width, resize_mode)
            for picture in pictures
        ]
        return torch.stack(resized)

    def preprocess_video(
        self, video: Any, height: int, width: int, resize_mode: str = "crop"
    ) -> Tensor:
        """Clips as pixels for the autoencoder.

        Args:
            video: A clip, or several of one length: lists of pictures, arrays (F, H, W, c) or
                (B, F, H, W, c), tensors (F, c, H, W), (B, c, F, H, W) or (B, F, c, H, W).
            height: As for :meth:`preprocess`.
            width: As for :meth:`preprocess`.
            resize_mode: As for :meth:`preprocess`.

        Returns:
            (B, 3, F, height, width), float32, -1 to 1.

        Raises:
            ValueError: If it is no clip, lengths differ, or the mode is unknown.
        """
        clips = [self.preprocess(clip, height, width, resize_mode) for clip in split_clips(video)]
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            raise ValueError(f"clips must have one length, got {lengths} frames")
        return torch.stack(clips).transpose(1, 2)

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
        latents = latents.to(getattr(vae, "dtype", latents.dtype))
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


def split_pictures(image: Any) -> list[Any]:
    """The single pictures of what :meth:`VaeImageProcessor.preprocess` takes."""
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, (list, tuple)):
        return [picture for part in image for picture in split_pictures(part)]
    if (
        not isinstance(image, (np.ndarray, Tensor))
        or image.ndim not in (2, 3, 4)
        or 0 in image.shape
    ):
        shape = getattr(image, "shape", None)
        what = type(image).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"an image must be a PIL image, an array (H, W, 3) or a tensor, got {what}"
        )
    return list(image) if image.ndim == 4 else [image]


def split_clips(video: Any) -> list[Any]:
    """The single clips of what :meth:`VaeImageProcessor.preprocess_video` takes."""
    if isinstance(video, (list, tuple)):
        is_batch = len(video) > 0 and (
            isinstance(video[0], (list, tuple)) or getattr(video[0], "ndim", 0) == 4
        )
        return list(video) if is_batch else [list(video)]
    ndim = getattr(video, "ndim", None)
    if ndim not in (4, 5):
        shape = tuple(getattr(video, "shape", ())) or type(video).__name__
        raise ValueError(f"a video must be a list of pictures or have 4 dimensions, got {shape}")
    if ndim == 4:
        return [video]
    if isinstance(video, Tensor) and video.size(1) == 3:
        video = video.transpose(1, 2)  # as this package returns videos
    return list(video)


def as_pixels(picture: Any) -> Tensor:
    """One picture as (3, H, W), float32, -1 to 1."""
    if isinstance(picture, Image.Image):
        picture = np.array(to_rgb(ImageOps.exif_transpose(picture)))
    if isinstance(picture, Tensor):
        x = picture.detach().cpu()
        is_channels_first = x.ndim == 3 and x.size(0) in (1, 3, 4) and x.size(2) not in (1, 3, 4)
        x = x.movedim(0, -1) if is_channels_first else x
    else:
        x = torch.as_tensor(np.ascontiguousarray(picture))
    x = x.unsqueeze(-1) if x.ndim == 2 else x
    if x.ndim != 3 or x.size(-1) not in (1, 3, 4):
        raise ValueError(
            f"a picture must have 1, 3 or 4 channels, got the shape {tuple(picture.shape)}"
        )
    x = to_unit_range(x)
    if x.size(-1) == 4:
        alpha = (x[..., 3:] + 1) / 2
        x = x[..., :3] * alpha + (1 - alpha)  # on white
    return x.expand(-1, -1, 3).movedim(-1, 0)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A PIL image without transparency, palettes or other colour models."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        array = np.asarray(picture, np.float32)
        scale = 255 / 65535 if array.max() > 255 else 1.0
        picture = Image.fromarray((array * scale).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_unit_range(x: Tensor) -> Tensor:
    """Pixel values as float32, -1 to 1; the range of floating-point values tells their scale.

    Raises:
        ValueError: If values are not finite or outside of 0 to 255.
    """
    if x.dtype == torch.bool:
        x = x.to(torch.uint8) * 255
    values = x.float()
    low, high = values.min().item(), values.max().item()
    if not (-1 <= low and high <= 255) or (low < 0 and (high > 1 or not x.is_floating_point())):
        raise ValueError(
            f"pixels must be 0 to 255, 0 to 1 or -1 to 1, got values from {low:g} to {high:g}"
        )
    if low < 0:
        return values
    if x.is_floating_point() and high <= 1:
        return values * 2 - 1
    return (values - 127.5) / 127.5


def resize(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Bring a picture (3, H, W), -1 to 1, to another size, with Lanczos filtering."""
    array = VaeImageProcessor.pt_to_numpy(pixels[None])[0]
    resizer = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=1)
    resized = resizer.resize(Image.fromarray(array), height, width, resize_mode=mode)
    return as_pixels(resized)
