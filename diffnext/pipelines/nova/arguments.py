"""The arguments of a call: one list for all generating pipelines, with kinds and limits."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import Parameter
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator
from pydantic import dataclasses as checked

from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.schedulers.denoising_run import Generators
from diffnext.utils.arguments import (
    CHECKED,
    AtLeastOne,
    AtLeastZero,
    Finite,
    Flag,
    LatentFrames,
    Listed,
    Positive,
    build_checked,
    take_checked,
)

__all__ = ["CallArguments", "takes"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

# Arguments that only the apps and evaluation scripts have.
_TOLERATED = {"seed", "randomize_seed", "progress", "num_images"}


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError("must be two numbers, the lower one first")
    return pair


@checked.dataclass(frozen=True, kw_only=True, config=CHECKED)
class CallArguments(GuidanceScaler):
    """What a pipeline is called with; :class:`GuidanceScaler` has the weights of guidance.

    Attributes:
        prompt: What to draw: a text, or a class id of a class-conditional model; one or several.
        num_inference_steps: Autoregressive steps (sets of tokens) per frame.
        num_diffusion_steps: Denoising steps of each set.
        max_latent_length: Latent frames T of the whole video; 1 is an image. A video autoencoder
            with 4 frames per latent makes 4 (T - 1) + 1 frames.
        num_frames: Frames of the whole video, instead of ``max_latent_length``.
        max_context_frames: How many of the latest latent frames the next one is drawn from, so
            long videos need no more memory than short ones; None is all. Results are equal as
            long as no more frames than these came before.
        flow_shift: Timestep shift of a flow-matching scheduler. It also holds for later calls of
            this pipeline in the same thread, until another is given; None keeps the last one, at
            first the scheduler's own. The scheduler itself is not changed, and the shift of a
            stream is only for that stream.
        motion_flow: Motion strength of videos: how far moving things move from frame to frame, in
            pixels at a height of 480, about 1 to 10.
        fps: Frames per second that the motion is measured at; 12 when None.
        negative_prompt: What to avoid with guidance, one for all or one per prompt; None is the
            empty text or the null class.
        image: First frame, one for all or one per prompt; see
            :meth:`diffnext.image_processor.VaeImageProcessor.preprocess` for the forms.
        video: First frames, one clip for all or one per prompt, of a length the autoencoder
            takes; see ``VaeImageProcessor.preprocess_video`` for the forms.
        pixel_range: The values of black and white in arrays and tensors of ``image`` and
            ``video``; None is (0, 1) for floating-point numbers, (0, 255) for integers. The "pt"
            results of a pipeline are (-1, 1). PIL images have the range of their mode.
        resize_mode: What happens to pictures of another size: "crop" covers the model's size and
            cuts the rest, "fill" fits them into it, "default" distorts them.
        latents: Scaled latent frames the video begins with: a list of (B, C, h, w), or a tensor
            (B, C, T, h, w) as "latent" returns it. If there are any, ``image`` and ``video`` are
            ignored.
        num_images_per_prompt: Samples of each prompt.
        generator: Source of randomness; a list gives each sample its own, so its result does not
            depend on its neighbours.
        prompt_embeds: Text states instead of prompts: a list of (k, D), or an array or tensor
            (B, k, D).
        negative_prompt_embeds: The same for the negative prompts.
        height: Checked against the model, which makes one size.
        width: The same.
        disable_progress_bar: Whether to be silent.
        output_type: "pil", "np" (uint8), "pt" (-1 to 1) or "latent", (B, C, T, h, w).
        vae_batch_size: Samples decoded at once.
        callback_on_step_end: Called as ``callback(pipe, step, frame, callback_kwargs)`` after
            each set of tokens; ``step`` counts the sets of all frames, given ones included, and
            ``frame`` is the index of the latent frame. Where tokens are predicted already, the
            drawing continues with the ``latents`` in the dict it returns, otherwise with those it
            was given, which it may edit. Setting ``pipe._interrupt`` ends this drawing, a video
            with its last whole frame.
        callback_on_step_end_tensor_inputs: What ``callback_kwargs`` holds: "latents", the frame
            being filled, (B, C, h, w).
        return_dict: Whether to name the result; otherwise it comes in a tuple of one.
    """

    guidance_scale: AtLeastZero = 5
    prompt: Any = None
    num_inference_steps: AtLeastOne = 64
    num_diffusion_steps: AtLeastOne = 25
    max_latent_length: AtLeastOne = 1
    num_frames: AtLeastOne | None = None
    max_context_frames: AtLeastOne | None = None
    flow_shift: Positive | None = None
    motion_flow: AtLeastZero = 5
    fps: Positive | None = None
    negative_prompt: Any = None
    image: Any = None
    video: Any = None
    pixel_range: Annotated[tuple[Finite, Finite], Listed, AfterValidator(_ascending)] | None = None
    resize_mode: Literal["crop", "fill", "default"] = "crop"
    latents: LatentFrames | None = None
    num_images_per_prompt: AtLeastOne = 1
    generator: Generators = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    height: AtLeastOne | None = None
    width: AtLeastOne | None = None
    disable_progress_bar: Flag = False
    output_type: Literal["pil", "np", "pt", "latent"] = "pil"
    vae_batch_size: AtLeastOne = 1
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Annotated[tuple[Literal["latents"], ...], Listed] = (
        "latents",
    )
    return_dict: Flag = True

    @property
    def guidance(self) -> GuidanceScaler:
        """Only the weights of guidance."""
        return take_checked(GuidanceScaler, dict(vars(self)))


def takes(
    *positional: str, without: Sequence[str] = ()
) -> Callable[[Callable[[Any, CallArguments], R]], Callable[..., R]]:
    """Call a method that takes :class:`CallArguments` with the arguments themselves.

    Args:
        *positional: Names of the arguments that may be given by position, in order.
        without: Names that the pipeline does not have.
    """
    defaults = {one.name: one.default for one in fields(CallArguments) if one.name not in without}
    names = [*positional, *(name for name in defaults if name not in positional)]
    kinds = get_type_hints(CallArguments)

    def parameter(name: str) -> Parameter:
        may_be_placed = name in positional
        kind = Parameter.POSITIONAL_OR_KEYWORD if may_be_placed else Parameter.KEYWORD_ONLY
        return Parameter(name, kind, default=defaults[name], annotation=kinds[name])

    this = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    others = Parameter("kwargs", Parameter.VAR_KEYWORD)
    signature = inspect.Signature([this, *map(parameter, names), others])

    def decorate(method: Callable[[Any, CallArguments], R]) -> Callable[..., R]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> R:
            given = signature.bind(self, *args, **kwargs).arguments
            given.pop("self")
            unknown = given.pop("kwargs", {}).keys() - _TOLERATED
            if unknown & set(without):
                wrong = " or ".join(sorted(unknown & set(without)))
                raise TypeError(f"{type(self).__name__} has no use for {wrong}")
            if unknown:
                logger.warning(
                    "%s ignores unknown arguments: %s", type(self).__name__, sorted(unknown)
                )
            return method(self, build_checked(CallArguments, given))

        vars(call)["__signature__"] = signature
        summary, *rest = inspect.cleandoc(method.__doc__ or "").split("\n\nReturns:")
        meanings = [_MEANINGS[name] for name in names]
        call.__doc__ = "\n\nReturns:".join([f"{summary}\n\nArgs:\n" + "\n".join(meanings), *rest])
        return call

    return decorate


def _meanings(cls: type) -> dict[str, str]:
    """What the docstring of a class says about each of its attributes."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", section)
    return {entry.split(":")[0].strip(): entry for entry in entries}


_MEANINGS = {**_meanings(GuidanceScaler), **_meanings(CallArguments)}
