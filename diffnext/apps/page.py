"""What the pages for pictures and for videos share."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.components import Component

from diffnext.apps import fragments
from diffnext.apps.fragments import Drawn, message
from diffnext.apps.studio import Drawing, DrawRequest, Snapshot, Studio
from diffnext.pipelines.model_card import Defaults, Ranges
from diffnext.utils.arguments import build_checked

__all__ = ["Page"]

MAX_SEED = 2**31 - 1
KEPT = (600, 3600)  # files are looked through every 600 s, and deleted when they are 3600 s old
AT_ONCE: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}
FOLDER = Path(__file__).parent
REUSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-index]");
  if (button) trigger("click", {index: Number(button.dataset.index)});
})
"""
SEED = "The same seed and settings give the same result."
GUIDANCE = "How closely to follow the prompt. Higher is closer but less varied."
SETS = "Sets of tokens that a frame is drawn in. More sets are finer and take longer."
STEPS = "Denoising steps of each set. More steps are cleaner and take longer."

Updates = dict[Component, Any]


class Page:
    """A page: a form, what is being drawn, and what was drawn in the visit.

    Args:
        studio: Draws.
        defaults: What the form shows at first.
        folder: Where results are written; gradio must be allowed to serve it.
    """

    WHAT: str
    DEFAULTS: Defaults
    RANGES = Ranges()
    NUM_SAMPLES = 1
    NEGATIVE_LINES = 5
    NEGATIVE_HELP = "What to leave out."
    OPTIONS_ARE_OPEN = True

    def __init__(self, studio: Studio, defaults: Defaults, folder: Path) -> None:
        self.studio = studio
        self.defaults = defaults
        self.folder = folder
        self.inputs: dict[str, Component] = {}  # by the names of the request, with seeds
        title = f"NOVA: text to {self.WHAT}"
        self.blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=KEPT)
        with self.blocks:
            self._build()

    # What a kind of page adds

    def add_options(self) -> None:
        """Add controls to the form; called inside of it."""

    def add_result_options(self) -> None:
        """Add controls below the results."""

    def make_request(self, **values: Any) -> DrawRequest:
        """What the form asks for.

        Args:
            **values: Those of ``inputs``, without the seed.

        Raises:
            ValueError: If something cannot be used.
        """
        return build_checked(DrawRequest, values)

    def write(self, clip: np.ndarray, name: str, parameters: dict[str, Any]) -> str:
        """Write a sample to a file, which carries its parameters.

        Args:
            clip: (F, H, W, 3) uint8.
            name: Of the file, without its ending.
            parameters: What it was made with.

        Returns:
            The path of the file.
        """
        raise NotImplementedError

    # The page

    def _build(self) -> None:
        height, width = self.studio.pixel_size
        gr.Markdown(
            "# Autoregressive Video Generation without Vector Quantization\n"
            "[Paper: arXiv 2412.14169](https://arxiv.org/abs/2412.14169) | "
            f"model: `{self.studio.model_name}`, {width} x {height} pixels",
            elem_id="header",
        )
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                self._add_prompt("prompt", self.defaults.examples[0], 5)
                with gr.Row(elem_id="buttons"):
                    what = f"Generate {self.WHAT.title()}"
                    generate = gr.Button(what, variant="primary", elem_id="generate")
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            with gr.Column(elem_id="shown"):
                gr.Markdown(f"## From words to {self.WHAT}s, one set of tokens after the other")
                self.status = add_html(message("What you draw appears here."), elem_id="status")
                self.results = add_html(self._places([]))
                self.add_result_options()
            with gr.Column(elem_id="options"):
                self._add_prompt(
                    "negative_prompt",
                    self.defaults.negative_prompt,
                    self.NEGATIVE_LINES,
                    self.NEGATIVE_HELP,
                )
                self.add_options()
                self._add_advanced_options()
        examples = [[text] for text in self.defaults.examples]
        gr.Examples(examples, [self.inputs["prompt"]], api_visibility="private")
        gr.Markdown("## Drawn in this visit")
        self.gallery = add_html(fragments.gallery([]), js_on_load=REUSE, elem_id="drawn")
        self.drawn = gr.State([])
        self._connect(generate)

    def _add_prompt(self, name: str, value: str, lines: int, help_text: str | None = None) -> None:
        """Add a box for a prompt, with its length below; Enter draws."""
        words = name.replace("_", " ")

        def tell_length(text: str) -> str:
            try:
                count = self.studio.count_tokens(text, words)
            except ValueError as error:
                return message(str(error), is_error=True)
            return message(f"{count} of {self.studio.pipe.tokenizer_max_length} tokens")

        box = gr.Textbox(
            value,
            label=words.title(),
            lines=lines,
            max_lines=lines,
            info=help_text,
            elem_id=words.replace(" ", "-"),
            elem_classes="enter-draws",
        )
        length = add_html(tell_length(value), kind="length")
        box.change(tell_length, box, length, trigger_mode="always_last", **AT_ONCE)
        self.inputs[name] = box

    def _add_advanced_options(self) -> None:
        with gr.Accordion("Advanced Options", open=self.OPTIONS_ARE_OPEN):
            self.inputs["seed"] = add_slider(
                0, MAX_SEED, 0, step=1, label="Seed", info=SEED, elem_id="seed"
            )
            self.inputs["randomize_seed"] = gr.Checkbox(
                True, label="Randomize seed", elem_id="randomize-seed"
            )
            for name, label, step, help_text in (
                ("guidance_scale", "Guidance scale", 0.1, GUIDANCE),
                ("num_inference_steps", "Inference steps", 1, SETS),
                ("num_diffusion_steps", "Diffusion steps", 1, STEPS),
            ):
                least, greatest = getattr(self.RANGES, name)
                self.inputs[name] = add_slider(
                    least,
                    greatest,
                    getattr(self.defaults, name),
                    step=step,
                    label=label,
                    info=help_text,
                    elem_id=label.lower().replace(" ", "-"),
                )

    def _connect(self, generate: gr.Button) -> None:
        inputs = list(self.inputs.values())
        generate.click(
            self.generate,
            [self.drawn, *inputs],
            [self.status, self.results, self.gallery, self.drawn, self.stop, self.inputs["seed"]],
            show_progress="hidden",
            concurrency_limit=None,  # the studio has its own queue
            api_visibility="private",
        )
        self.stop.click(self.end, **AT_ONCE)
        self.gallery.click(self.reuse, self.drawn, inputs, **AT_ONCE)
        self.blocks.unload(self.end)
        self.blocks.load(js=FOLDER.joinpath("page.js").read_text(encoding="utf-8"))

    # What happens on it

    def end(self, visitor: gr.Request) -> None:
        """Stop the visitor's drawing."""
        self.studio.stop(str(visitor.session_hash))

    def generate(self, visitor: gr.Request, drawn: list[Drawn], *values: Any) -> Iterator[Updates]:
        """Draw what the form asks for, with the given seed and those after it.

        Args:
            visitor: Filled in by gradio.
            drawn: What was drawn before in this visit.
            *values: Those of ``inputs``, in order.

        Yields:
            What changes on the page.
        """
        given = dict(zip(self.inputs, values, strict=True))
        seed = int(given.pop("seed"))
        if given.pop("randomize_seed"):
            seed = random.SystemRandom().randrange(MAX_SEED)
        seeds = [(seed + index) % (MAX_SEED + 1) for index in range(self.NUM_SAMPLES)]
        yield {self.stop: gr.Button(interactive=True), self.inputs["seed"]: seed}
        ending = message("You left the queue; nothing was drawn.")
        try:
            request = self.make_request(**given)
            for snapshot in self.studio.draw(str(visitor.session_hash), request, seeds):
                if isinstance(snapshot, Drawing):
                    new = self._keep(snapshot, request, seeds)
                    drawn = new + [one for one in drawn if one.path.exists()]
                    yield {
                        self.results: self._places(new),
                        self.gallery: fragments.gallery(drawn),
                        self.drawn: drawn,
                    }
                    ending = message(describe_end(snapshot))
                else:
                    yield self._show_progress(snapshot)
        except ValueError as error:
            ending = message(str(error), is_error=True)
        except torch.OutOfMemoryError:
            ending = message("There is not enough GPU memory for this.", is_error=True)
        yield {self.status: ending, self.stop: gr.Button(interactive=False)}

    def _show_progress(self, snapshot: Snapshot) -> Updates:
        if snapshot.ahead:
            return {self.status: message(f"You are number {snapshot.ahead + 1} in the queue.")}
        text = f"Set {snapshot.done} of {snapshot.total}" if snapshot.done else "Starting ..."
        if snapshot.seconds_left is not None:
            text += f", about {snapshot.seconds_left:.0f} s left"
        updates: Updates = {self.status: fragments.progress(text, snapshot.done, snapshot.total)}
        if snapshot.clips is not None:
            previews = [fragments.preview_url(clip[-1]) for clip in snapshot.clips]
            updates[self.results] = self._places(previews)
        return updates

    def _places(self, shown: Sequence[Drawn | str]) -> str:
        return fragments.results(self.studio.pixel_size, self.NUM_SAMPLES, shown)

    def _keep(self, drawing: Drawing, request: DrawRequest, seeds: Sequence[int]) -> list[Drawn]:
        """Write the samples of a drawing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = []
        for clip, seed in zip(drawing.clips, seeds, strict=True):
            parameters = self.studio.describe(request, seed)
            if drawing.done < drawing.total:
                parameters["stopped_after_sets"] = drawing.done
            name = f"nova-{seed}-{time.time_ns():x}"
            path = self.write(clip, str(self.folder / name), parameters)
            self.blocks.upload_file_set.add(path)  # gradio deletes it in time
            kept.append(Drawn(Path(path), parameters))
        return kept

    def reuse(self, drawn: list[Drawn], event: gr.EventData) -> list[Any]:
        """Fill the form with what a result was made with, and keep its seed."""
        parameters = drawn[event.index].parameters | {"randomize_seed": False}
        return [parameters.get(name, gr.skip()) for name in self.inputs]


def add_slider(least: float, greatest: float, value: float, **options: Any) -> gr.Slider:
    """Add a slider; gradio would print a traceback for requests with numbers out of its range."""

    def check(number: Any) -> float:
        if not isinstance(number, int | float) or not least <= number <= greatest:
            rule = f"{slider.label} must be {least} to {greatest}, got {number!r}"
            raise gr.Error(rule, print_exception=False)
        return number

    slider = gr.Slider(least, greatest, value, **options)
    # Not a subclass: gradio writes a .pyi file beside the module of every subclass of a component.
    vars(slider)["preprocess"] = check
    return slider


def add_html(value: str, kind: str = "", **options: Any) -> gr.HTML:
    """Add HTML that has the page's own style, in the classes "plain" and ``kind``."""
    return gr.HTML(value, apply_default_css=False, elem_classes=["plain", kind], **options)


def describe_end(drawing: Drawing) -> str:
    """How a drawing ended."""
    if drawing.done == drawing.total:
        return "Done."
    text = f"Stopped after set {drawing.done} of {drawing.total}"
    frames = drawing.clips.shape[1]
    if frames == 1:
        return f"{text}. Grey parts are not drawn yet."
    return f"{text}. The first {frames} frames are kept."


def read_examples(name: str) -> tuple[str, ...]:
    """The prompts in a file of this folder, one per line."""
    return tuple(FOLDER.joinpath(name).read_text(encoding="utf-8").splitlines())
