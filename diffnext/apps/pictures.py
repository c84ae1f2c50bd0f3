"""The page that draws pictures.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffnext.apps.page import Page, read_examples
from diffnext.pipelines.model_card import Defaults
from diffnext.utils import export_to_image

__all__ = ["PicturePage"]


class PicturePage(Page):
    """Draws four pictures of a prompt; a model of videos draws their first frame."""

    WHAT = "image"
    NUM_SAMPLES = 4
    DEFAULTS = Defaults(
        guidance_scale=5,
        num_inference_steps=64,
        num_diffusion_steps=25,
        negative_prompt=(
            "blurry, noisy, pixelated, washed out, badly cropped, watermark, caption, "
            "distorted face, extra fingers, missing limbs, twisted hands, wrong proportions"
        ),
        examples=read_examples("pictures.txt"),
    )

    def write(self, clip: np.ndarray, name: str, parameters: dict[str, Any]) -> str:
        """See :meth:`diffnext.apps.page.Page.write`."""
        return export_to_image(clip[0], f"{name}.webp", quality=95, parameters=parameters)
