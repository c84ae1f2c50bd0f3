"""Text to image, text to video and image to video with NOVA.

Shapes: B samples, n prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffnext.models.embeddings import TextEmbed
from diffnext.models.text_encoders.encoding import count_tokens, encode_texts
from diffnext.pipelines.nova.arguments import CallArguments, takes
from diffnext.pipelines.nova.components import TextComponents
from diffnext.pipelines.nova.generation import GenerationPipeline
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput
from diffnext.utils.messages import naming, one_line

__all__ = ["NOVAPipeline"]

logger = logging.getLogger(__name__)

POSITIONAL = (
    "prompt",
    "num_inference_steps",
    "num_diffusion_steps",
    "max_latent_length",
    "guidance_scale",
    "guidance_trunc",
    "guidance_renorm",
    "image_guidance_scale",
    "spatiotemporal_guidance_scale",
    "flow_shift",
    "motion_flow",
    "negative_prompt",
    "image",
    "num_images_per_prompt",
    "generator",
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "disable_progress_bar",
    "output_type",
)


class NOVAPipeline(GenerationPipeline, TextComponents):
    """Generates images and videos from text, and videos from an image (arXiv:2412.14169).

    Its components: :class:`~diffnext.pipelines.nova.components.TextComponents`.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"

    @property
    def tokenizer_max_length(self) -> int | None:
        """Tokens of a prompt that the model reads; None for a model that reads none."""
        text_embed = None if self.transformer is None else self.transformer.text_embed
        return None if text_embed is None else text_embed.num_tokens

    @takes(*POSITIONAL)
    def __call__(self, arguments: CallArguments) -> NOVAPipelineOutput | tuple[Any]:
        """Draw pictures or videos of prompts.

        Returns:
            ``images`` for pictures, ``frames`` for videos and for latents.

        Raises:
            TypeError: If an argument is of another kind, or only other pipelines have it.
            ValueError: If an argument is wrong, or does not fit the others or the model.
        """
        return self.draw(arguments)

    @takes(*POSITIONAL)
    def stream(self, arguments: CallArguments) -> Iterator[Any]:
        """Draw a video piece by piece, called like the pipeline itself.

        Each piece comes as soon as the latents of one tile of the autoencoder exist, long before
        the last frame is made; end to end they are the whole video.

        Returns:
            An iterator over the frames of each tile, in the form of ``output_type``: "np" and
            "pil" uint8 (B, F, H, W, 3), "pt" (B, 3, F, H, W), "latent" (B, C, T, h, w). Images
            are one piece, as the pipeline returns them.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        return self.draw_pieces(arguments)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        *,
        do_classifier_free_guidance: bool | None = None,
    ) -> Tensor:
        """Raw text states of prompts and, with guidance, of negative prompts below them.

        Args:
            prompt: One text or n.
            num_images_per_prompt: How often each row is repeated, consecutively.
            negative_prompt: One text for all, one per prompt, or None for empty ones.
            prompt_embeds: n text states instead of prompts.
            negative_prompt_embeds: The same for the negative ones.
            do_classifier_free_guidance: Whether there are rows of negative prompts; when None,
                there are if negative prompts or states are given.

        Returns:
            (n, 2n with guidance, times num_images_per_prompt; num_tokens; width).

        Raises:
            ValueError: If counts differ, nothing is given, or texts and embeddings are mixed.
            TypeError: If a prompt is not a text.
        """
        if do_classifier_free_guidance is None:
            negatives = (negative_prompt, negative_prompt_embeds)
            do_classifier_free_guidance = any(one is not None for one in negatives)
        arguments = CallArguments(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        prompts = self._parse_prompts(arguments, do_classifier_free_guidance)
        return self._encode_prompts(prompts, num_images_per_prompt)

    def _parse_prompts(self, arguments: CallArguments, is_guided: bool) -> list[str] | Tensor:
        """Checked texts, or padded states (n or 2n, num_tokens, width), the negative ones last."""
        text_embed = self._text_embed()
        if arguments.prompt_embeds is None:
            if arguments.negative_prompt_embeds is not None:
                raise ValueError("negative_prompt_embeds need prompt_embeds, but texts are given")
            texts = as_texts("prompt", arguments.prompt)
            negatives = negative_texts(arguments.negative_prompt, len(texts))
            return texts + negatives if is_guided else texts
        states = padded_states("prompt_embeds", arguments.prompt_embeds, text_embed)
        for name, is_given in (
            ("prompt", arguments.prompt is not None),
            ("negative_prompt", any(negative_texts(arguments.negative_prompt, len(states)))),
        ):
            if is_given:
                raise ValueError(
                    f"{name} is given, but so are prompt_embeds: pass only {name}_embeds"
                )
        given = arguments.negative_prompt_embeds
        if given is None:
            given = [torch.zeros(0, text_embed.token_dim)] * len(states)
        negative_states = padded_states("negative_prompt_embeds", given, text_embed)
        check_count("negative_prompt_embeds", negative_states, states)
        return text_embed.pad_states([*states, *negative_states]) if is_guided else states

    def _encode_prompts(self, prompts: list[str] | Tensor, num_images_per_prompt: int) -> Tensor:
        if isinstance(prompts, list):
            embed = self._text_embed()
            limits = (embed.num_tokens, embed.token_dim)
            states = encode_texts(self.tokenizer, self.text_encoder, prompts, *limits)
            pairs = zip(prompts, states, strict=True)
            self._report_cut({t for t, s in pairs if len(s) == embed.num_tokens}, embed.num_tokens)
            prompts = embed.pad_states(states)
        return prompts.repeat_interleave(num_images_per_prompt, dim=0)

    def _report_cut(self, texts: set[str], most: int) -> None:
        """Warn of those among some texts that have more tokens than the model reads."""
        for text in sorted(texts):
            count = count_tokens(self.tokenizer, text, self.text_encoder)
            if count > most:
                cut = "a prompt has %d tokens, of which the model reads the first %d: %s"
                logger.warning(cut, count, most, one_line(text))

    def _text_embed(self) -> TextEmbed:
        text_embed = None if self.transformer is None else self.transformer.text_embed
        if text_embed is None:
            raise ValueError("the transformer takes classes, not texts: use NOVAC2IPipeline")
        return text_embed


def as_texts(name: str, value: Any) -> list[str]:
    """One text or several as a list.

    Raises:
        TypeError: If one is not a text.
        ValueError: If there is none.
    """
    if value is None:
        raise ValueError(f"{name} is None: give a text, or prompt_embeds")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, got {one_line(value)}")
    if not texts:
        raise ValueError(f"{name} is an empty list: give at least one text")
    return list(texts)


def negative_texts(value: Any, count: int) -> list[str]:
    """A negative text for each prompt.

    Raises:
        TypeError: If one is not a text.
        ValueError: If there are neither one nor ``count``.
    """
    if value is None or (isinstance(value, (str, list, tuple)) and len(value) == 0):
        return [""] * count
    texts = as_texts("negative_prompt", value)
    if isinstance(value, str):
        return texts * count
    check_count("negative_prompt", texts, range(count))
    return texts


def padded_states(name: str, value: Any, text_embed: TextEmbed) -> Tensor:
    """Text states that a user gives, (n, num_tokens, width).

    Raises:
        TypeError: If they are not floating-point arrays or tensors.
        ValueError: If there are none, they do not fit, or hold NaN or infinity.
    """
    is_array = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 3
    if not is_array and not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of (k, {text_embed.token_dim}) or a tensor "
            f"(B, k, {text_embed.token_dim}), got {one_line(value)}"
        )
    with naming(name):
        return text_embed.pad_states(value)


def check_count(name: str, negatives: Sized, prompts: Sized) -> None:
    """Check that every prompt has its negative one.

    Raises:
        ValueError: If it has none, or there are more.
    """
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{name} must hold one negative prompt per prompt: got {len(negatives)} for "
            f"{len(prompts)} prompts"
        )
