"""The page that draws videos.

Shapes: H W pixels.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from apps.studio import DrawRequest, Stopped, Studio, choose_seed
from apps.widgets import (
    add_advanced_options,
    add_buttons,
    add_header,
    add_prompt,
    connect,
    new_page,
    report_errors,
    visitor_of,
)
from diffnext.models.autoencoders.tiling import TilingMixin
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.model_card import Defaults, Ranges
from diffnext.utils import export_to_video
from diffnext.utils.messages import naming
from diffnext.utils.pictures import load_picture, to_rgb

__all__ = ["DEFAULTS", "RANGES", "VideoApp", "crop_image", "make_presets"]

FPS = 12
MOTION_FLOW = 5
LATENT_LENGTHS = (9, 5, 1)
RANGES = Ranges(num_diffusion_steps=(1, 100))
DEFAULTS = Defaults(
    guidance_scale=7.0,
    num_inference_steps=128,
    num_diffusion_steps=100,
    negative_prompt="",  # videos move better without
    examples=(
        "A valley of knitted wool, its river of blue yarn winding between stitched hills.",
        "Sea turtles glide over a coral garden, shafts of light sweep across the sand.",
        "Extreme close-up of an old sailor's face, rain runs down his cheeks, he looks up slowly.",
        "A woman in a heavy emerald velvet gown with silver embroidery and a high lace collar "
        "stands in a candlelit hall. Pearls are woven into her dark hair, a fox mask dangles from "
        "her gloved hand. She turns her head towards the window, and the candles flicker.",
        "The camera starts low behind a row of glass bottles on a workbench, moves slowly to the "
        "left between them, rises over a brass microscope and a heap of dried flowers, and comes "
        "to rest above an open notebook, while dust drifts through the afternoon sun.",
    ),
)


class VideoApp:
    """Draws a video of a prompt, or one that goes on from a picture.

    Args:
        studio: Draws.
        defaults: What the page shows at first.

    Raises:
        ValueError: If its model draws pictures only.
    """

    def __init__(self, studio: Studio, defaults: Defaults) -> None:
        self.studio = studio
        self.defaults = defaults
        self.presets = make_presets(studio.pipe, *studio.pixel_size)

    def build_page(self) -> gr.Blocks:
        """The page."""
        defaults = self.defaults
        with new_page("NOVA: text to video") as page:
            add_header(self.studio.model_name)
            with gr.Row():
                with gr.Column():
                    prompt = add_prompt(
                        "Prompt", defaults.examples[0], 5, "prompt", "Describe the video"
                    )
                    negative = add_prompt(
                        "Negative Prompt",
                        defaults.negative_prompt,
                        1,
                        "negative-prompt",
                        "Describe what should not be in the video; left empty, it moves better",
                    )
                    image = gr.Image(
                        label="Image Prompt (Optional)",
                        type="filepath",  # to be opened here, as gradio takes any format
                        image_mode=None,  # crop_image converts, and lays transparency on white
                        sources=["upload", "clipboard"],
                        elem_id="image-prompt",
                    )
                    options = add_advanced_options(defaults, RANGES, is_open=False)
                    buttons = add_buttons("Generate Video")
                with gr.Column():
                    gr.Markdown("### From words to videos, one set of tokens after the other")
                    preset = gr.Dropdown(
                        list(self.presets),
                        value=next(iter(self.presets)),
                        label="Video Preset",
                        elem_id="preset",
                    )
                    flow = gr.Slider(1, 10, MOTION_FLOW, step=1, label="Motion Flow")
                    result = gr.Video(
                        label="Result",
                        show_label=False,
                        interactive=False,
                        autoplay=True,
                        height=480,
                        loop=True,
                        elem_id="result1",
                        elem_classes="result",
                    )
            gr.Examples(
                [[text, MOTION_FLOW] for text in defaults.examples],
                [prompt, flow],
                api_visibility="private",
            )
            inputs = [prompt, negative, image, flow, preset, *options]
            outputs = [result, options[0]]
            boxes = [prompt, negative]
            connect(page, self.studio, buttons, boxes, self.generate_video, inputs, outputs)
        return page

    def generate_video(
        self,
        prompt: str,
        negative_prompt: str,
        image_prompt: str | None,
        motion_flow: float,
        preset: str,
        seed: int,
        randomize_seed: bool,
        guidance_scale: float,
        num_inference_steps: int,
        num_diffusion_steps: int,
        visitor: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio looks for it here
    ) -> list[Any]:
        """Draw a video.

        Args:
            prompt: What to draw.
            negative_prompt: What to avoid.
            image_prompt: File of its first frame, of any size, or None.
            motion_flow: Motion strength.
            preset: One of ``presets``.
            seed: Of the video.
            randomize_seed: Whether to take another one by lot.
            guidance_scale: Weight of the prompt.
            num_inference_steps: Sets of tokens a latent frame.
            num_diffusion_steps: Denoising steps a set.
            visitor: Filled in by gradio.
            progress: Filled in by gradio.

        Returns:
            Path of an MP4 file, which carries its parameters, and the seed.

        Raises:
            gr.Error: If the request cannot be met.
        """
        seed = choose_seed(seed, randomize_seed)
        with report_errors():
            picture = image_prompt and read_upload(image_prompt)
            request = DrawRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                num_inference_steps=int(num_inference_steps),
                num_diffusion_steps=int(num_diffusion_steps),
                max_latent_length=self.presets[preset],
                motion_flow=motion_flow,
                image=picture and crop_image(picture, *self.studio.pixel_size),
            )
            try:
                samples = self.studio.draw(
                    visitor_of(visitor),
                    request,
                    [seed],
                    lambda done, total, text: progress((done, total), desc=text, unit="sets"),
                )
            except Stopped:
                return [gr.skip(), gr.skip()]
        path = self.studio.new_file(seed, ".mp4")
        parameters = {**self.studio.describe(request, seed), "export_fps": FPS}
        return [export_to_video(samples[0], path, fps=FPS, parameters=parameters), seed]


def make_presets(pipe: NOVAPipeline, height: int, width: int) -> dict[str, int]:
    """Latent frames of each video that the page offers, by "frames x width x height".

    Args:
        pipe: Whose model tells how long videos may be.
        height: Of its videos.
        width: Of its videos.

    Raises:
        ValueError: If it draws pictures only.
    """
    longest = pipe.transformer.config.video_base_size[0]
    if longest < 2 or not isinstance(pipe.vae, TilingMixin):
        raise ValueError("the model draws pictures, not videos: see app_nova_t2i.py")
    lengths = [
        length
        for length in LATENT_LENGTHS
        if length <= longest and pipe.vae.legal_latent_length(length) == length
    ]
    return {f"{pipe.vae.sample_length(length)}x{width}x{height}": length for length in lengths}


def read_upload(path: str) -> Image.Image:
    """A picture that a visitor sent; errors do not name its place on this machine."""
    with open(path, "rb") as file, naming("the image prompt"):
        return load_picture(file)


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
