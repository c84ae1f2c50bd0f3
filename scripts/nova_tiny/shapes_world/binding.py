"""Whether a model gives each shape its own colour, from its losses: nothing is drawn.

The binding share is the cost of swapping the two colours of a prompt, over the cost of naming two
other colours. A model that reads shapes and colours separately loses nothing by swapping them; one
that gives every shape its colour comes near 1, if not quite, as some colours are seen more often
with a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.pipelines.builder import build_diffusion_scheduler
from shapes_world.captions import write_prompt
from shapes_world.rendering import render_scene
from shapes_world.scenes import COLORS, Description, draw_description, draw_scene

BATCH = 64
NOISE_LEVELS = 4
HIDDEN = {"all": (1 - 1e-6, 1.0, 0.01), "0.8": (0.79, 0.81, 1.0)}  # mask ratios


def measure_binding(pipe: Any, seed: int, number: int = 256) -> dict[str, dict[str, float]]:
    """Losses of fresh pictures of two named colours, under right and wrong prompts.

    Args:
        pipe: A pipeline of pictures, in float32.
        seed: Of pictures, noise and hidden tokens.
        number: Pictures.

    Returns:
        By share of hidden tokens: ``right``, the loss with the right prompt; ``swapped`` and
        ``other``, the costs of swapping the colours and of naming others; ``share``, their ratio.
    """
    rng = np.random.default_rng(seed)
    descriptions = [draw_description(rng, "attribution") for _ in range(number)]
    latents = _encode(pipe, [render_scene(draw_scene(rng, d)) for d in descriptions])
    prompts = {
        "right": [write_prompt(d) for d in descriptions],
        "swapped": [write_prompt(_recolor(d, *_colors(d)[::-1])) for d in descriptions],
        "other": [write_prompt(_recolor(d, *_others(rng, d))) for d in descriptions],
    }
    result = {}
    for hidden, ratios in HIDDEN.items():
        losses = {name: _loss(pipe, latents, texts, ratios) for name, texts in prompts.items()}
        costs = {name: losses[name] - losses["right"] for name in ("swapped", "other")}
        share = costs["swapped"] / costs["other"] if costs["other"] > 0 else 0.0
        result[hidden] = {"right": losses["right"], **costs, "share": share}
    return result


def _colors(description: Description) -> list[Any]:
    return [mention.color for mention in description.mentions]


def _others(rng: np.random.Generator, description: Description) -> list[str]:
    free = [color for color in COLORS if color not in _colors(description)]
    return list(rng.permutation(free)[: len(description.mentions)])


def _recolor(description: Description, *colors: str) -> Description:
    pairs = zip(description.mentions, colors, strict=True)
    return replace(description, mentions=tuple(replace(m, color=color) for m, color in pairs))


@torch.no_grad()
def _encode(pipe: Any, pictures: Sequence[np.ndarray]) -> Tensor:
    """Scaled latents, (B, C, h, w)."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
    means = [pipe.vae.encode(part).latent_dist.mean for part in pixels.split(BATCH)]
    return pipe.vae.scale_(torch.cat(means))


@torch.no_grad()
def _loss(pipe: Any, latents: Tensor, texts: Sequence[str], ratios: Sequence[float]) -> float:
    """Mean loss, with the same noise and the same hidden tokens for all texts."""
    model = pipe.transformer
    scheduler = build_diffusion_scheduler(pipe.scheduler)
    before, model.mask_embed.mask_ratios = model.mask_embed.mask_ratios, list(ratios)
    drawn_before = np.random.get_state()
    losses = []
    try:
        for start in range(0, len(texts), BATCH):
            part = list(texts[start : start + BATCH])
            states = encode_texts(
                pipe.tokenizer,
                pipe.text_encoder,
                part,
                model.text_embed.num_tokens,
                model.text_embed.token_dim,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(start)
                np.random.seed(start)
                condition = model.encode_condition(states)
                x = latents[start : start + BATCH]
                loss = model.train_video(x, condition, scheduler, NOISE_LEVELS)["loss"]
            losses += [float(loss)] * len(part)
    finally:
        model.mask_embed.mask_ratios = before
        np.random.set_state(drawn_before)
    return float(np.mean(losses))
