"""Pieces of HTML for the pages; whatever comes from a visitor is escaped.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

__all__ = ["Drawn", "gallery", "message", "preview_url", "progress", "results"]

PREVIEW_SIDE = 512  # pixels, at most


@dataclass(frozen=True)
class Drawn:
    """A picture or video that was drawn.

    Attributes:
        path: Its file.
        parameters: What it was made with.
    """

    path: Path
    parameters: dict[str, Any]

    @property
    def url(self) -> str:
        """Where the page finds the file."""
        return f"gradio_api/file={quote(str(self.path))}"

    @property
    def alt(self) -> str:
        """What it shows, for screen readers."""
        return f"{self.parameters['prompt']} (seed {self.parameters['seed']})"


def message(text: str, is_error: bool = False) -> str:
    """A line of text, such as how a drawing ended."""
    return f'<p class="{"wrong" if is_error else ""}">{escape(text)}</p>'


def progress(text: str, done: int, total: int) -> str:
    """A line of text over a bar."""
    return (
        f'<p aria-hidden="true">{escape(text)}</p>'
        f'<progress aria-label="Sets drawn" value="{done}" max="{total}"></progress>'
    )


def preview_url(picture: np.ndarray) -> str:
    """A small copy of a picture, (H, W, 3) uint8, as a data URL."""
    image = Image.fromarray(picture)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def results(size: tuple[int, int], count: int, shown: Sequence[Drawn | str] = ()) -> str:
    """A place for each result, which has its final size from the start.

    Args:
        size: Height and width of a picture or video.
        count: Number of places.
        shown: What to show so far: results, or URLs of previews.
    """
    places = []
    for number in range(count):
        one = shown[number] if number < len(shown) else None
        inside, below = "", "&nbsp;"
        if isinstance(one, str):
            inside = f'<img src="{one}" alt="Result {number + 1}, being drawn" decoding="sync">'
        elif one is not None:
            inside = media(one, plays=True)
            below = f"<span>Seed {one.parameters['seed']}</span> {download(one)}"
        ratio = f"{size[1]} / {size[0]}"
        places.append(
            f'<figure id="result{number + 1}"><div class="place" style="aspect-ratio: {ratio}">'
            f"{inside}</div><figcaption>{below}</figcaption></figure>"
        )
    return f'<div class="results of-{count}">{"".join(places)}</div>'


def gallery(drawn: Sequence[Drawn]) -> str:
    """Everything that was drawn in a visit, the newest first."""
    if not drawn:
        return message("What you draw is kept here until you leave the page, for an hour at most.")
    cards = []
    for index, one in enumerate(drawn):
        parameters = escape(json.dumps(one.parameters, indent=1, ensure_ascii=False))
        cards.append(
            f'<li><div class="place">{media(one)}</div>'
            f'<p class="prompt">{escape(one.parameters["prompt"])}</p>'
            f'<p><button type="button" data-index="{index}" aria-label="Use settings of '
            f'{escape(one.alt)}">Use settings</button> {download(one)}</p>'
            f"<details><summary>Parameters</summary><pre>{parameters}</pre></details></li>"
        )
    return f'<ul class="visit">{"".join(cards)}</ul>'


def media(one: Drawn, plays: bool = False) -> str:
    """A picture, or a video, which may begin by itself."""
    alt, url = escape(one.alt), escape(one.url)
    if one.path.suffix == ".mp4":
        attributes = f"{'autoplay' if plays else ''} loop muted playsinline controls preload='auto'"
        return f'<video src="{url}" aria-label="{alt}" {attributes}></video>'
    return f'<a href="{url}" target="_blank"><img src="{url}" alt="{alt}" decoding="sync"></a>'


def download(one: Drawn) -> str:
    """A link that saves the file."""
    name, alt = escape(one.path.name), escape(one.alt)
    return f'<a href="{escape(one.url)}" download="{name}" aria-label="Download {alt}">Download</a>'
