"""From pictures to the pixels that the autoencoder reads, and from latents to pictures.

Shapes: B batch, C latent channels, T latent frames, h w latent size, F frames, H W pixels, c colour
channels (1 grey, 3 RGB, 4 RGB and opacity).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.image_processor
import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image, ImageOps
from torch import Tensor

from diffnext.utils.pictures import to_rgb

__all__ = ["OUTPUT_TYPES", "RESIZE_MODES", "VaeImageProcessor", "full_precision"]

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# As in diffusers: cover the size and cut the rest, fit into it on a blurred border, distort.
RESIZE_MODES = ("crop", "fill", "default")
FORMS = {
    "image": "an image must be a PIL image, an array (H, W, c) or (B, H, W, c), a tensor (c, H, W) "
    "or (B, c, H, W), or a list of pictures",
    "video": "a video must be a list of pictures, an array (F, H, W, c) or (B, F, H, W, c), a "
    "tensor (F, c, H, W) or (B, c, F, H, W), or a list of clips",
}

PixelRange = tuple[float, float] | None


class VaeImageProcessor:
    """Encodes pictures as pixels, decodes latents and converts pixels."""

    def preprocess(
        self,
        image: Any,
        height: int,
        width: int,
        resize_mode: str = "crop",
        pixel_range: PixelRange = None,
    ) -> Tensor:
        """Pictures as pixels for the autoencoder.

        Args:
            image: A picture or several: PIL images, arrays (H, W), (H, W, c) or (B, H, W, c),
                tensors (H, W), (c, H, W) or (B, c, H, W), or a list of single pictures. The EXIF
                orientation is applied, transparency laid on white, grey made RGB.
            height: Height of the result; pictures of exactly this size stay as they are.
            width: Its width.
            resize_mode: "crop" scales a picture to cover the size and cuts the rest,
                "fill" fits it into the size on a blurred border, "default" distorts it.
            pixel_range: The values of black and white in arrays and tensors, such as (-1, 1) for
                the "pt" results of a pipeline, whose floating-point values may overshoot and are
                cut. None means 0 to 1 for floating-point numbers and booleans, 0 to 255 for
                integers, and nothing outside. PIL images keep the range of their mode: 0 to 65535
                in "I" and the 16-bit modes, 0 to 255 in all others, "F" included.

        Returns:
            (B, 3, height, width), float32, -1 to 1.

        Raises:
            ValueError: If it is not a picture, values are outside of their range, or the mode
                or the range cannot be used.
        """
        x = to_pixels("image", image, (height, width), resize_mode, parse_range(pixel_range))
        if x.ndim > 4:
            raise ValueError(f"{FORMS['image']}, got pictures on {x.ndim - 3} axes")
        return x.reshape(-1, *x.shape[-3:])

    def preprocess_video(
        self,
        video: Any,
        height: int,
        width: int,
        resize_mode: str = "crop",
        pixel_range: PixelRange = None,
    ) -> Tensor:
        """Clips as pixels for the autoencoder.

        Args:
            video: A clip, or several of one length: lists of pictures, arrays (F, H, W, c) or
                (B, F, H, W, c), tensors (F, c, H, W) or, as pipelines return them,
                (B, c, F, H, W); the first clip of such a result is ``result[:1]``.
            height: As for :meth:`preprocess`.
            width: As for :meth:`preprocess`.
            resize_mode: As for :meth:`preprocess`.
            pixel_range: As for :meth:`preprocess`.

        Returns:
            (B, 3, F, height, width), float32, -1 to 1.

        Raises:
            ValueError: As for :meth:`preprocess`, or if lengths differ.
        """
        x = to_pixels("video", video, (height, width), resize_mode, parse_range(pixel_range))
        if x.ndim not in (4, 5):
            raise ValueError(f"{FORMS['video']}, got pictures on {x.ndim - 3} axes")
        return x.reshape(-1, *x.shape[-4:]).transpose(1, 2)

    @staticmethod
    @torch.no_grad()
    def decode_latents(vae: Any, latents: Tensor, vae_batch_size: int = 1) -> Tensor:
        """Decode a batch in chunks.

        Args:
            vae: The autoencoder; see :func:`full_precision` for its dtype.
            latents: Scaled latents of any dtype, (B, C, h, w) or (B, C, T, h, w).
            vae_batch_size: Samples decoded at once.

        Returns:
            Pixels, (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1, in the dtype decoded in.

        Raises:
            ValueError: If ``vae_batch_size`` is not positive.
        """
        if vae_batch_size < 1:
            raise ValueError(f"vae_batch_size must be at least 1, got {vae_batch_size}")
        with full_precision(vae) as dtype:
            latents = latents.to(get_module_execution_device(vae), dtype)
            chunks = vae.unscale_(latents).split(vae_batch_size)
            return torch.cat([vae.decode(chunk).sample for chunk in chunks])

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """Pixels (B, 3, ..., H, W) from -1..1 to uint8 (B, ..., H, W, 3), truncated; NaN is 0."""
        num_nan = int(images.isnan().sum())
        if num_nan:
            logger.warning("%d pixel values are NaN and become 0", num_nan)
        scaled = (images.float() * 127.5 + 127.5).nan_to_num(0).clamp(0, 255)
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


_casting = threading.Lock()
_upcast: Counter[Any] = Counter()  # how many threads use each autoencoder that is now float32


@contextmanager
def full_precision(vae: Any) -> Iterator[torch.dtype]:
    """Use an autoencoder in its own dtype, or in float32 if it overflows in float16.

    A float16 autoencoder with ``force_upcast`` in its config is cast to float32 here and cast back
    when the last thread that uses it leaves. Autocast is off inside. Offloaded weights stay where
    they are: accelerate's hooks bring them to the device in the dtype they are cast to.

    Args:
        vae: The autoencoder.

    Yields:
        The dtype that its inputs must have.
    """
    is_upcast = False
    try:
        # Weights cast in inference mode could never be trained again.
        with _casting, torch.inference_mode(False):
            is_upcast = vae in _upcast or (
                vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))
            )
            if is_upcast:
                _upcast[vae] += 1
                vae.float()
        with torch.autocast(get_module_execution_device(vae).type, enabled=False):
            yield vae.dtype
    finally:
        if is_upcast:
            with _casting, torch.inference_mode(False):
                _upcast[vae] -= 1
                if not _upcast[vae]:
                    del _upcast[vae]
                    vae.half()


def to_pixels(
    name: str, given: Any, size: tuple[int, int], resize_mode: str, pixel_range: PixelRange
) -> Tensor:
    """Pictures as (..., 3, height, width), float32, -1 to 1; a list becomes a leading axis."""
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, got {resize_mode!r}")
    if isinstance(given, (list, tuple)):
        parts = [to_pixels(name, part, size, resize_mode, pixel_range) for part in given]
        if len({part.shape for part in parts}) != 1:
            lengths = sorted({math.prod(part.shape[:-3]) for part in parts})
            raise ValueError(f"{FORMS[name]}, all of one length, got {lengths} frames")
        return torch.stack(parts)
    if isinstance(given, Image.Image):
        given, pixel_range = np.asarray(to_rgb(ImageOps.exif_transpose(given), name)), None
    x = to_unit_range(name, to_tensor(name, given), pixel_range)
    if x.size(-3) == 4:
        opacity = (x[..., 3:, :, :] + 1) / 2
        x = x[..., :3, :, :] * opacity + (1 - opacity)  # on white
    x = x.expand(*x.shape[:-3], 3, -1, -1)
    if x.shape[-2:] == size:
        return x
    resizer = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=1)
    pictures = VaeImageProcessor().postprocess(x.reshape(-1, *x.shape[-3:]))
    resized = [resizer.resize(picture, *size, resize_mode=resize_mode) for picture in pictures]
    return to_pixels(name, resized, size, resize_mode, None).reshape(*x.shape[:-2], *size)


def to_tensor(name: str, given: Any) -> Tensor:
    """An array or a tensor as (..., c, H, W), in a dtype of real numbers."""
    if isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        # A copy: torch takes neither reversed axes nor foreign byte orders.
        x = torch.from_numpy(np.array(given, given.dtype.newbyteorder("=")))
        x = x.movedim(-1, -3) if x.ndim > 2 else x
    elif isinstance(given, Tensor) and not given.is_complex():
        x = given.detach().cpu()
        x = x.transpose(1, 2) if x.ndim == 5 else x
    else:
        kind = getattr(given, "dtype", type(given).__name__)
        raise ValueError(f"{FORMS[name]}, of real numbers, got {kind}")
    x = x.unsqueeze(0) if x.ndim == 2 else x
    if x.ndim < 3 or 0 in x.shape or x.size(-3) not in (1, 3, 4):
        kind = f"{tuple(given.shape)} ({type(given).__name__})"
        raise ValueError(f"{FORMS[name]}, with 1, 3 or 4 channels, got the shape {kind}")
    return x


def to_unit_range(name: str, x: Tensor, pixel_range: PixelRange) -> Tensor:
    """Pixel values as float32, -1 to 1, from the given range or the range of their dtype."""
    is_unit = x.is_floating_point() or x.dtype == torch.bool
    low, high = pixel_range or (0, 1 if is_unit else 255)
    slack = high - low if pixel_range and x.is_floating_point() else 0
    reason = "by pixel_range" if pixel_range else f"for {x.dtype} unless pixel_range says otherwise"
    values = x.float()
    if not ((values >= low - slack) & (values <= high + slack)).all():
        got = f"values from {values.min():g} to {values.max():g}"
        raise ValueError(f"{name} must be {low:g} to {high:g} {reason}, got {got}")
    return (values.clamp(low, high) - (low + high) / 2) / ((high - low) / 2)


def parse_range(pixel_range: Any) -> PixelRange:
    """The argument as two floats, or None; raises for anything else."""
    if pixel_range is None:
        return None
    try:
        low, high = map(float, pixel_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"pixel_range must be (low, high), two numbers, got {pixel_range!r}")
    return low, high
