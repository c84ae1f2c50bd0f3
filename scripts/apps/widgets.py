"""What the pages of the apps share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch
from gradio.components import Component

from apps.studio import MAX_PROMPT_LENGTH, MAX_SEED, Studio
from diffnext.pipelines.model_card import Defaults, Ranges

__all__ = [
    "add_advanced_options",
    "add_buttons",
    "add_header",
    "add_prompt",
    "connect",
    "new_page",
    "report_errors",
    "visitor_of",
]

# In a box of several lines, gradio takes Enter for a new line. Enter that ends the input of a
# character (isComposing) stays with the input method.
ENTER_DRAWS = """
() => document.querySelectorAll(".enter-draws textarea").forEach((box) =>
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      event.stopPropagation();
      document.querySelector("#generate").click();
    }
  }, true))
"""


def new_page(title: str) -> gr.Blocks:
    """An empty page that tells nobody of its use and deletes its files when they are an hour old.

    Args:
        title: Of the browser's window.
    """
    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600))


def add_header(model_name: str) -> None:
    """The top of the page.

    Args:
        model_name: What draws.
    """
    gr.Markdown(
        "# Autoregressive Video Generation without Vector Quantization\n"
        f"[Paper: arXiv 2412.14169](https://arxiv.org/abs/2412.14169) | model: `{model_name}`",
        elem_id="header",
    )


def add_prompt(label: str, value: str, lines: int, elem_id: str, placeholder: str) -> gr.Textbox:
    """A box for a prompt; Enter draws, Shift and Enter too."""
    return gr.Textbox(
        value,
        label=label,
        lines=lines,
        max_lines=lines,
        max_length=MAX_PROMPT_LENGTH,
        placeholder=placeholder,
        elem_id=elem_id,
        elem_classes="enter-draws" if lines > 1 else None,
    )


def add_advanced_options(defaults: Defaults, ranges: Ranges, is_open: bool) -> list[Component]:
    """Seed, whether it is random, guidance, inference steps and diffusion steps."""
    with gr.Accordion("Advanced Options", open=is_open):
        seed = gr.Slider(0, MAX_SEED, 0, step=1, label="Seed", elem_id="seed")
        randomize = gr.Checkbox(True, label="Randomize seed", elem_id="randomize-seed")
        guidance = gr.Slider(
            *ranges.guidance_scale, defaults.guidance_scale, step=0.1, label="Guidance scale"
        )
        with gr.Row():
            inference_steps = gr.Slider(
                *ranges.num_inference_steps,
                defaults.num_inference_steps,
                step=1,
                label="Inference steps",
                elem_id="inference-steps",
            )
            diffusion_steps = gr.Slider(
                *ranges.num_diffusion_steps,
                defaults.num_diffusion_steps,
                step=1,
                label="Diffusion steps",
                elem_id="diffusion-steps",
            )
    return [seed, randomize, guidance, inference_steps, diffusion_steps]


def add_buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """The buttons that begin and stop."""
    with gr.Row():
        generate = gr.Button(label, variant="primary", size="lg", scale=3, elem_id="generate")
        stop = gr.Button("Stop", variant="stop", size="lg", scale=1, elem_id="stop")
    return generate, stop


def connect(
    page: gr.Blocks,
    studio: Studio,
    buttons: tuple[gr.Button, gr.Button],
    boxes: Sequence[gr.Textbox],
    function: Callable[..., Any],
    inputs: Sequence[Component],
    outputs: Sequence[Component],
) -> None:
    """Make the page work; call it inside the page's ``with`` block.

    One visitor is served at a time; the others wait, and see their place. Stop takes a visitor
    out of the queue, and ends the drawing that is in progress. So does leaving the page.

    Args:
        page: The page.
        studio: Where the drawing is stopped.
        buttons: Those of :func:`add_buttons`.
        boxes: Where Enter draws.
        function: Draws; its arguments are the values of ``inputs``.
        inputs: What is filled in.
        outputs: Results, and last the seed.
    """
    generate, stop = buttons
    run = gr.on(
        [generate.click, *(box.submit for box in boxes)],
        function,
        list(inputs),
        list(outputs),
        show_progress_on=list(outputs[:-1]),
        trigger_mode="once",
        concurrency_limit=1,
        api_visibility="private",
    )

    def stop_run(request: gr.Request) -> None:
        studio.stop(visitor_of(request))

    stop.click(stop_run, cancels=[run], queue=False, api_visibility="private")
    # Taking a visitor out of the queue fails in gradio's page and leaves "Error" on the results.
    # Real errors are shown in a message of their own.
    run.failure(
        lambda: [gr.skip()] * len(outputs),
        outputs=list(outputs),
        queue=False,
        api_visibility="private",
    )
    page.unload(stop_run)
    page.load(js=ENTER_DRAWS)


def visitor_of(request: gr.Request | None) -> str:
    """A name for a visitor's page; outside of a page there is one."""
    return (request and request.session_hash) or "local"


@contextmanager
def report_errors() -> Iterator[None]:
    """Show the visitor what is wrong with a request; other errors stay in the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error("There is not enough GPU memory.", print_exception=False) from error
