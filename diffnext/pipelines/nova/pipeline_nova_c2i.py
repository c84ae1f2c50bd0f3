"""Images of a class with NOVA.

Shapes: B samples, n prompts, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffnext.models.embeddings import LabelEmbed
from diffnext.models.modeling_utils import evaluating
from diffnext.pipelines.nova.arguments import CallArguments, takes
from diffnext.pipelines.nova.components import ClassComponents
from diffnext.pipelines.nova.generation import GenerationPipeline
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput
from diffnext.utils.messages import one_line

__all__ = ["NOVAC2IPipeline"]

POSITIONAL = (
    "prompt",
    "num_inference_steps",
    "num_diffusion_steps",
    "guidance_scale",
    "min_guidance_scale",
    "negative_prompt",
    "num_images_per_prompt",
    "generator",
    "latents",
    "disable_progress_bar",
    "output_type",
)
TEXT_ONLY = ("prompt_embeds", "negative_prompt_embeds")


class NOVAC2IPipeline(GenerationPipeline, ClassComponents):
    """Generates images from class labels (arXiv:2412.14169).

    Its components: :class:`~diffnext.pipelines.nova.components.ClassComponents`.
    """

    model_cpu_offload_seq: Any = "transformer->vae"

    @takes(*POSITIONAL, without=TEXT_ONLY)
    def __call__(self, arguments: CallArguments) -> NOVAPipelineOutput | tuple[Any]:
        """Draw pictures of classes.

        Returns:
            ``images``; as latents (B, C, 1, h, w).

        Raises:
            TypeError: If an argument is of another kind, or only other pipelines have it.
            ValueError: If an argument is wrong, or does not fit the others or the model.
        """
        return self.draw(arguments)

    @takes(*POSITIONAL, without=TEXT_ONLY)
    def stream(self, arguments: CallArguments) -> Iterator[Any]:
        """Draw piece by piece, see :meth:`NOVAPipeline.stream`; a picture is one piece."""
        return self.draw_pieces(arguments)

    def _name_of(self, x: Tensor) -> str:
        return "images" if x.ndim == 4 or x.size(2) == 1 else "frames"

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: int | Sequence[int],
        num_images_per_prompt: int = 1,
        negative_prompt: int | Sequence[int] | None = None,
        *,
        do_classifier_free_guidance: bool | None = None,
    ) -> Tensor:
        """Embed classes and, with guidance, the classes to avoid below them.

        Args:
            prompt: Class id, one or n.
            num_images_per_prompt: How often each row is repeated, consecutively.
            negative_prompt: One class for all or one per prompt; None is the null class.
            do_classifier_free_guidance: Whether there are rows of classes to avoid; when None,
                there are if ``negative_prompt`` is given.

        Returns:
            (n, 2n with guidance, times num_images_per_prompt; 1; D).

        Raises:
            ValueError: If there is no such class, or counts differ.
        """
        if do_classifier_free_guidance is None:
            do_classifier_free_guidance = negative_prompt is not None
        arguments = CallArguments(prompt=prompt, negative_prompt=negative_prompt)
        classes = self._parse_prompts(arguments, do_classifier_free_guidance)
        rows = self._encode_prompts(classes, num_images_per_prompt)
        with evaluating(self.transformer):  # training drops some classes
            return self.transformer(partial(self._label_embed(), rows))

    def _parse_prompts(self, arguments: CallArguments, is_guided: bool) -> list[int]:
        """Checked class ids, those to avoid last."""
        null = self._label_embed().num_classes
        if arguments.prompt is None:
            raise ValueError("prompt is None: give class ids")
        classes = as_classes("prompt", arguments.prompt, null)
        given = arguments.negative_prompt
        negatives = as_classes("negative_prompt", null if given is None else given, null)
        if len(negatives) not in (1, len(classes)):
            raise ValueError(
                f"negative_prompt must be one class or one per prompt, got {len(negatives)} for "
                f"{len(classes)} prompts"
            )
        negatives *= len(classes) // len(negatives)
        return classes + negatives if is_guided else classes

    def _encode_prompts(self, prompts: list[int], num_images_per_prompt: int) -> Tensor:
        return torch.tensor(prompts).repeat_interleave(num_images_per_prompt)

    def _label_embed(self) -> LabelEmbed:
        label_embed = None if self.transformer is None else self.transformer.label_embed
        if label_embed is None:
            raise ValueError("the transformer takes texts, not classes: use NOVAPipeline")
        return label_embed


def as_classes(name: str, value: Any, null: int) -> list[int]:
    """Class ids as a list; the null class is one of them.

    Raises:
        ValueError: If there is none, or the model does not have it.
    """
    try:
        ids = torch.atleast_1d(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    classes = ids.tolist() if ids.ndim == 1 and is_integer else []
    if not classes or not 0 <= min(classes) <= max(classes) <= null:
        raise ValueError(f"{name} must be whole numbers from 0 to {null}, got {one_line(value)}")
    return classes
