"""The page that draws pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.studio import MAX_SEED, DrawRequest, Stopped, Studio, choose_seed
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
from diffnext.pipelines.model_card import Defaults, Ranges
from diffnext.utils import export_to_image

__all__ = ["DEFAULTS", "RANGES", "ImageApp"]

NUM_IMAGES = 4
RANGES = Ranges()
DEFAULTS = Defaults(
    guidance_scale=5,
    num_inference_steps=64,
    num_diffusion_steps=25,
    negative_prompt=(
        "blurry, noisy, pixelated, washed out, badly cropped, watermark, caption, "
        "distorted face, extra fingers, missing limbs, twisted hands, wrong proportions"
    ),
    examples=(
        "a fisherman with a grey beard mends his net, evening light, close portrait",
        "a girl with freckles laughs under a yellow umbrella in the rain",
        "a boy asleep on a hay bale, an old sheepdog leaning on him",
        "a heron of folded paper, ink and watercolour, white background",
        "a badger in a tweed suit reads a newspaper in a tea room",
        "fireworks mirrored in a canal between tall narrow houses",
        "a moss-covered giant sits in a misty valley and holds a lantern",
        "a tortoise in a spacesuit floats above a ringed planet",
        "a cheerful round robin and a sulky snail share a toadstool, cartoon",
    ),
)


class ImageApp:
    """Draws four pictures of a prompt.

    Args:
        studio: Draws; a model of videos draws their first frame.
        defaults: What the page shows at first.
    """

    def __init__(self, studio: Studio, defaults: Defaults) -> None:
        self.studio = studio
        self.defaults = defaults

    def build_page(self) -> gr.Blocks:
        """The page."""
        defaults = self.defaults
        with new_page("NOVA: text to image") as page:
            add_header(self.studio.model_name)
            with gr.Row():
                with gr.Column():
                    prompt = add_prompt(
                        "Prompt", defaults.examples[0], 5, "prompt", "Describe the picture"
                    )
                    negative = add_prompt(
                        "Negative Prompt",
                        defaults.negative_prompt,
                        5,
                        "negative-prompt",
                        "Describe what should not be in the picture",
                    )
                    options = add_advanced_options(defaults, RANGES, is_open=True)
                    buttons = add_buttons("Generate Image")
                with gr.Column():
                    gr.Markdown("### From words to pictures, one set of tokens after the other")
                    results = []
                    for row in range(2):
                        with gr.Row():
                            for column in range(2):
                                results.append(add_result(1 + 2 * row + column))
            gr.Examples([[text] for text in defaults.examples], [prompt], api_visibility="private")
            inputs = [prompt, negative, *options]
            outputs = [*results, options[0]]
            boxes = [prompt, negative]
            connect(page, self.studio, buttons, boxes, self.generate_image4, inputs, outputs)
        return page

    def generate_image4(
        self,
        prompt: str,
        negative_prompt: str,
        seed: int,
        randomize_seed: bool,
        guidance_scale: float,
        num_inference_steps: int,
        num_diffusion_steps: int,
        visitor: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio looks for it here
    ) -> list[Any]:
        """Draw four pictures, of the given seed and the next three.

        Args:
            prompt: What to draw.
            negative_prompt: What to avoid.
            seed: Of the first picture.
            randomize_seed: Whether to take another one by lot.
            guidance_scale: Weight of the prompt.
            num_inference_steps: Sets of tokens.
            num_diffusion_steps: Denoising steps a set.
            visitor: Filled in by gradio.
            progress: Filled in by gradio.

        Returns:
            Paths of four WebP files, which carry their parameters, and the seed.

        Raises:
            gr.Error: If the request cannot be met.
        """
        seed = choose_seed(seed, randomize_seed)
        seeds = [(seed + index) % (MAX_SEED + 1) for index in range(NUM_IMAGES)]
        with report_errors():
            request = DrawRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                num_inference_steps=int(num_inference_steps),
                num_diffusion_steps=int(num_diffusion_steps),
            )
            try:
                samples = self.studio.draw(
                    visitor_of(visitor),
                    request,
                    seeds,
                    lambda done, total, text: progress((done, total), desc=text, unit="sets"),
                )
            except Stopped:
                return [gr.skip()] * (NUM_IMAGES + 1)
        pictures = samples if samples.ndim == 4 else samples[:, 0]
        paths = []
        for picture, own_seed in zip(pictures, seeds, strict=True):
            path = self.studio.new_file(own_seed, ".webp")
            parameters = self.studio.describe(request, own_seed)
            paths.append(export_to_image(picture, path, quality=95, parameters=parameters))
        return [*paths, seed]


def add_result(number: int) -> gr.Image:
    """Where one picture will be."""
    return gr.Image(
        label=f"Result{number}",
        show_label=False,
        interactive=False,
        format="webp",
        type="filepath",
        height=300,
        buttons=["download", "fullscreen"],
        elem_id=f"result{number}",
        elem_classes="result",
    )
