"""The page that draws videos.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from diffnext.apps.fragments import message
from diffnext.apps.page import AT_ONCE, Page, add_html, add_slider, read_examples
from diffnext.apps.studio import DrawRequest
from diffnext.models.autoencoders.tiling import TilingMixin
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.model_card import Defaults, Ranges
from diffnext.utils import export_to_video
from diffnext.utils.arguments import build_checked
from diffnext.utils.pictures import load_picture, to_rgb

__all__ = ["VideoPage", "crop_image", "make_presets"]

FPS = 12
LATENT_LENGTHS = (9, 5, 1)
UPLOAD_HELP = "The video begins with the middle of this picture, scaled to its size."


class VideoPage(Page):
    """Draws a video of a prompt, or one that goes on from a picture.

    Raises:
        ValueError: If the studio's model draws pictures only.
    """

    WHAT = "video"
    NEGATIVE_LINES = 1
    NEGATIVE_HELP = "What to leave out. Left empty, videos move better."
    OPTIONS_ARE_OPEN = False
    RANGES = Ranges(num_diffusion_steps=(1, 100))
    DEFAULTS = Defaults(
        guidance_scale=7.0,
        num_inference_steps=128,
        num_diffusion_steps=100,
        negative_prompt="",  # videos move better without
        examples=read_examples("videos.txt"),
    )

    def add_result_options(self) -> None:
        """Add the length of the video and its motion."""
        presets = make_presets(self.studio.pipe, *self.studio.pixel_size)
        self.inputs["max_latent_length"] = gr.Dropdown(
            presets,
            value=presets[0][1],
            label="Video Preset",
            info="Frames x width x height. Fewer frames are drawn sooner.",
            elem_id="preset",
        )
        self.inputs["motion_flow"] = add_slider(
            1, 10, 5, step=1, label="Motion Flow", info="How much things move. 5 is usual."
        )

    def add_options(self) -> None:
        """Add a place for the picture that the video begins with."""
        image = gr.Image(
            label="Image Prompt (Optional)",
            type="filepath",
            image_mode=None,  # crop_image converts, and lays transparency on white
            sources=["upload", "clipboard"],
            height=220,
            placeholder="Drop an image file here to upload",  # as screen readers say it
            alt_text="The picture that the video begins with",
            elem_id="image-prompt",
        )
        # gradio would open a file of any format before it can be checked.
        vars(image)["preprocess"] = lambda file: file and file.path
        note = add_html(message(UPLOAD_HELP), kind="length")
        image.upload(check_upload, image, [image, note], **AT_ONCE)
        self.inputs["image"] = image

    def make_request(self, **values: Any) -> DrawRequest:
        """See :meth:`diffnext.apps.page.Page.make_request`."""
        file = values.pop("image")
        image = crop_image(read_upload(file), *self.studio.pixel_size) if file else None
        return build_checked(DrawRequest, values | {"image": image})

    def write(self, clip: np.ndarray, name: str, parameters: dict[str, Any]) -> str:
        """See :meth:`diffnext.apps.page.Page.write`."""
        parameters["export_fps"] = FPS
        return export_to_video(clip, f"{name}.mp4", fps=FPS, parameters=parameters)


def make_presets(pipe: NOVAPipeline, height: int, width: int) -> list[tuple[str, int]]:
    """The videos that the page offers: "frames x width x height", and their latent frames.

    Args:
        pipe: Its model limits how long videos may be.
        height: Of its videos, in pixels.
        width: Of its videos, in pixels.

    Raises:
        ValueError: If the model draws pictures only.
    """
    longest = pipe.transformer.config["video_base_size"][0]
    if longest < 2 or not isinstance(pipe.vae, TilingMixin):
        raise ValueError("this model draws pictures, not videos: use `diffnext app image`")
    lengths = [
        length
        for length in LATENT_LENGTHS
        if length <= longest and pipe.vae.legal_latent_length(length) == length
    ]
    return [(f"{pipe.vae.sample_length(length)}x{width}x{height}", length) for length in lengths]


def check_upload(path: str) -> tuple[Any, str]:
    """Remove an upload that cannot be used, and say why."""
    try:
        read_upload(path)
    except ValueError as error:
        return None, message(str(error), is_error=True)
    return gr.skip(), message(UPLOAD_HELP)


def read_upload(path: str) -> Image.Image:
    """A picture that a visitor sent, upright, in RGB; errors do not say where its file lies."""
    try:
        with open(path, "rb") as file:
            return to_rgb(ImageOps.exif_transpose(load_picture(file)), "")
    except ValueError as error:
        raise ValueError(f"This file cannot be used: it {str(error).strip()}.") from error


def crop_image(image: Image.Image, target_h: int, target_w: int) -> np.ndarray:
    """The middle of a picture, of the target's shape and size.

    Its EXIF orientation is applied; grey and other colour models become RGB, and transparency is
    laid on white.

    Args:
        image: Of any size.
        target_h: Height of the result.
        target_w: Width of the result.

    Returns:
        (target_h, target_w, 3) uint8, scaled bilinearly.
    """
    picture = to_rgb(ImageOps.exif_transpose(image))
    width, height = picture.size
    if width * target_h > height * target_w:
        crop_w, crop_h = max(height * target_w // target_h, 1), height
    else:
        crop_w, crop_h = width, max(width * target_h // target_w, 1)
    left = (width - crop_w) // 2
    top = (height - crop_h) // 2
    cropped = picture.crop((left, top, left + crop_w, top + crop_h))
    return np.array(cropped.resize((target_w, target_h), Image.Resampling.BILINEAR))
