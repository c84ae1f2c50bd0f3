"""Text to image, text to video and image to video with NOVA.

Shapes: B samples, n prompts, C latent channels, h w latent size, T latent frames, H W pixels.
"""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffnext.image_processor import RESIZE_MODES
from diffnext.models.autoencoders.modeling_utils import TilingMixin
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.generation import GenerationPipelineMixin, StepCallback
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput, PipelineMixin

__all__ = ["NOVAPipeline"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class CallArguments:
    """The arguments of one call of :class:`NOVAPipeline`, which documents them."""

    prompt: str | Sequence[str] | None = None
    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    max_latent_length: int = 1
    guidance_scale: float = 5
    guidance_trunc: float = 0
    guidance_renorm: float = 1
    image_guidance_scale: float = 0
    spatiotemporal_guidance_scale: float = 0
    flow_shift: float | None = None
    motion_flow: float = 5
    negative_prompt: str | Sequence[str] | None = None
    image: Any = None
    num_images_per_prompt: int = 1
    generator: Generators = None
    latents: Sequence[Tensor] | None = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    disable_progress_bar: bool = False
    output_type: str = "pil"
    video: Any = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    resize_mode: str = "crop"
    fps: float | None = None
    min_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: int = 1
    vae_batch_size: int = 1
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    return_dict: bool = True


class NOVAPipeline(GenerationPipelineMixin, PipelineMixin, DiffusionPipeline):
    """Generates images and videos from text, and videos from an image (arXiv:2412.14169).

    Args:
        transformer: The NOVA model.
        scheduler: Denoises tokens; a flow-matching or DDPM scheduler of diffusers or diffnext.
        vae: Decodes latents.
        text_encoder: Encodes prompts; not needed when embeddings are passed.
        tokenizer: Of the text encoder.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: NOVATransformer3DModel = None,
        scheduler: SchedulerMixin = None,
        vae: ModelMixin = None,
        text_encoder: PreTrainedModel = None,
        tokenizer: PreTrainedTokenizerBase = None,
        trust_remote_code: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        self._setup_generation()
        if transformer is not None and transformer.text_embed is not None:
            self.tokenizer_max_length = transformer.text_embed.num_tokens
            transformer.text_embed.encoders = [tokenizer, text_encoder]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 64,
        num_diffusion_steps: int = 25,
        max_latent_length: int = 1,
        guidance_scale: float = 5,
        guidance_trunc: float = 0,
        guidance_renorm: float = 1,
        image_guidance_scale: float = 0,
        spatiotemporal_guidance_scale: float = 0,
        flow_shift: float | None = None,
        motion_flow: float = 5,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Sequence[Tensor] | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        disable_progress_bar: bool = False,
        output_type: str = "pil",
        *,
        video: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "crop",
        fps: float | None = None,
        min_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_reuse: int = 1,
        vae_batch_size: int = 1,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **kwargs: Any,
    ) -> NOVAPipelineOutput | tuple[Any]:
        """Generate.

        Args:
            prompt: What to draw, one text or several.
            num_inference_steps: Autoregressive steps (sets of tokens) a frame.
            num_diffusion_steps: Denoising steps of each set.
            max_latent_length: Latent frames T of the whole video; 1 is an image. A video
                autoencoder with 4 frames a latent makes 4 (T - 1) + 1 frames.
            guidance_scale: Weight of the prompt; above 1 guidance is on.
            guidance_trunc: Diffusion timestep below which guidance is off; 0 = never.
            guidance_renorm: Below 1, guidance may not lengthen predictions: their norm is
                brought down towards the unguided one, at most by this factor.
            image_guidance_scale: Weight of earlier frames against none.
            spatiotemporal_guidance_scale: Weight of a third, perturbed pass; NOVA perturbs
                nothing, so that it has no effect.
            flow_shift: Timestep shift of the scheduler, from this call on; None keeps the last.
            motion_flow: Motion strength of videos.
            negative_prompt: What to avoid, one text for all or one a prompt.
            image: First frame, one for all or one a prompt; see
                :meth:`diffnext.image_processor.VaeImageProcessor.preprocess` for the forms.
            num_images_per_prompt: Samples of each prompt.
            generator: Source of randomness; a list gives each sample its own, so that its result
                does not depend on its neighbours.
            latents: Scaled latent frames the video begins with, each (B, C, h, w); they are
                left as they are and win over ``image``.
            prompt_embeds: Text states instead of prompts: a list of (k, D) or a (B, k, D) tensor.
            negative_prompt_embeds: The same for the negative prompts.
            disable_progress_bar: Whether to be silent.
            output_type: "pil", "np" (uint8), "pt" (-1 to 1) or "latent".
            video: First frames, one clip for all or one a prompt, of a length the autoencoder
                takes; see ``VaeImageProcessor.preprocess_video`` for the forms.
            num_frames: Frames of the whole video, in place of ``max_latent_length``.
            height: Checked against the model, which makes one size.
            width: The same.
            resize_mode: What happens to pictures of another size: "crop" covers the model's
                size and cuts the rest, "fill" fits them into it, "default" distorts them.
            fps: Frames per second that the motion is measured at; 12 when None.
            min_guidance_scale: Where ``guidance_scale`` starts in each frame; None = constant.
            guidance_interval: Least and greatest diffusion timestep at which guidance is on, an
                approximation that saves the second pass elsewhere; None = all.
            guidance_reuse: Sets of tokens that share the image encoder's unguided states, an
                approximation that saves its second pass in all but one of them; 1 = off.
            vae_batch_size: Samples decoded at once.
            callback_on_step_end: Called as ``callback(pipe, step, frame, callback_kwargs)`` after
                each set of tokens, with the latent frame's index in place of a timestep; a
                returned ``{"latents": ...}`` replaces the frame. Setting ``pipe._interrupt``
                ends the video with the last whole frame.
            callback_on_step_end_tensor_inputs: What ``callback_kwargs`` holds: "latents", the
                frame being filled, (B, C, h, w).
            return_dict: Whether to name the result; else it is alone in a tuple.
            **kwargs: Ignored; names that the apps and scripts do not use give a warning.

        Returns:
            ``images`` for pictures, ``frames`` for videos and for latents.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        self.warn_unknown(set(kwargs))
        arguments = CallArguments(
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            max_latent_length=max_latent_length,
            guidance_scale=guidance_scale,
            guidance_trunc=guidance_trunc,
            guidance_renorm=guidance_renorm,
            image_guidance_scale=image_guidance_scale,
            spatiotemporal_guidance_scale=spatiotemporal_guidance_scale,
            flow_shift=flow_shift,
            motion_flow=motion_flow,
            negative_prompt=negative_prompt,
            image=image,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            disable_progress_bar=disable_progress_bar,
            output_type=output_type,
            video=video,
            num_frames=num_frames,
            height=height,
            width=width,
            resize_mode=resize_mode,
            fps=fps,
            min_guidance_scale=min_guidance_scale,
            guidance_interval=guidance_interval,
            guidance_reuse=guidance_reuse,
            vae_batch_size=vae_batch_size,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
        )
        try:
            x = self.generate(self._prepare(arguments))
            x = self.decode(x, vae_batch_size, output_type)
        finally:
            self.maybe_free_model_hooks()
        return self.package(x, "images" if x.ndim == 4 else "frames", output_type, return_dict)

    @torch.no_grad()
    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Generate a video piece by piece.

        Each piece comes as soon as the latents of one tile of the autoencoder exist, long before
        the last frame is made; end to end they are the whole video.

        Args:
            *args: As for calling the pipeline.
            **kwargs: The same.

        Returns:
            An iterator over the frames of each tile, in the form of ``output_type``: "np" and
            "pil" uint8 (B, F, H, W, 3), "pt" (B, 3, F, H, W), "latent" (B, C, T, h, w). Images
            are one piece, as the pipeline returns them.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        known = {field.name for field in fields(CallArguments)} & set(kwargs)
        self.warn_unknown(set(kwargs) - known)
        arguments = CallArguments(*args, **{name: kwargs[name] for name in known})
        inputs = self._prepare(arguments)
        return self.stream_frames(
            inputs, inputs["max_latent_length"], arguments.vae_batch_size, arguments.output_type
        )

    def _prepare(self, arguments: CallArguments) -> dict[str, Any]:
        """Check the arguments, encode prompts and first frames; returns the model's inputs."""
        num_latents = self.check_inputs(arguments)
        self.transformer.eval()  # before prompts are embedded: training drops some
        self.guidance_scale = arguments.guidance_scale
        inputs = {
            "num_diffusion_steps": arguments.num_diffusion_steps,
            "max_latent_length": num_latents,
            "guidance_scale": arguments.guidance_scale,
            "min_guidance_scale": arguments.min_guidance_scale,
            "guidance_interval": arguments.guidance_interval,
            "guidance_reuse": arguments.guidance_reuse,
            "guidance_trunc": arguments.guidance_trunc,
            "guidance_renorm": arguments.guidance_renorm,
            "image_guidance_scale": arguments.image_guidance_scale,
            "spatiotemporal_guidance_scale": arguments.spatiotemporal_guidance_scale,
            "generator": arguments.generator,
            "fps": arguments.fps,
            **self.common_inputs(
                arguments.num_inference_steps, num_latents, arguments.disable_progress_bar
            ),
        }
        prompt = self.encode_prompt(
            arguments.prompt,
            arguments.num_images_per_prompt,
            arguments.negative_prompt,
            arguments.prompt_embeds,
            arguments.negative_prompt_embeds,
        )
        batch_size = len(prompt) // (2 if arguments.guidance_scale > 1 else 1)
        inputs["prompt"] = prompt.to(self._execution_device)
        inputs["batch_size"] = batch_size
        inputs["motion_flow"] = [arguments.motion_flow] * batch_size
        inputs["latents"] = self._first_latents(arguments, batch_size)
        if arguments.flow_shift:
            self.scheduler.set_shift(arguments.flow_shift)
        return self.start_run(
            inputs, arguments.callback_on_step_end, arguments.callback_on_step_end_tensor_inputs
        )

    def check_inputs(self, arguments: CallArguments) -> int:
        """Reject what cannot work, before any work is done.

        Args:
            arguments: Arguments of the call.

        Returns:
            The number of latent frames of the result.

        Raises:
            ValueError: Naming the rule and the value.
        """
        self.check_run(
            arguments.output_type,
            arguments.vae_batch_size,
            arguments.callback_on_step_end_tensor_inputs,
        )
        prompt = arguments.prompt
        if prompt is None and arguments.prompt_embeds is None:
            raise ValueError("prompt is None: give a prompt, or prompt_embeds")
        if arguments.prompt_embeds is None and not isinstance(prompt, str) and len(prompt) == 0:
            raise ValueError("prompt is an empty list: give at least one prompt")
        if arguments.num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be at least 1, got {arguments.num_images_per_prompt}"
            )
        if arguments.image is not None and arguments.video is not None:
            raise ValueError("a video begins with an image or with a video, got both")
        for name, wanted in zip(("height", "width"), self._pixel_size(), strict=True):
            value = getattr(arguments, name)
            if value not in (None, wanted):
                raise ValueError(f"the model makes pictures of {name} {wanted}, got {value}")
        if arguments.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"resize_mode must be one of {RESIZE_MODES}, got {arguments.resize_mode!r}"
            )
        flow_shift = arguments.flow_shift
        if flow_shift and not hasattr(self.scheduler, "set_shift"):
            raise ValueError(
                f"flow_shift={flow_shift} needs a flow-matching scheduler, but the pipeline has "
                f"{type(self.scheduler).__name__}, which cannot be shifted"
            )
        return self._check_length(arguments)

    def _check_length(self, arguments: CallArguments) -> int:
        length, num_frames = arguments.max_latent_length, arguments.num_frames
        if length < 1:
            raise ValueError(f"max_latent_length must be at least 1, got {length}")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if not self._makes_videos():
            for name, value in (("max_latent_length", length), ("num_frames", num_frames or 1)):
                if value > 1:
                    raise ValueError(
                        f"{name}={value} asks for a video, but this is an image model: use "
                        f"{name}=1 or a video checkpoint"
                    )
            return 1
        if not isinstance(self.vae, TilingMixin):  # absent, or one whose lengths are not known
            if num_frames is not None:
                raise ValueError(
                    f"num_frames={num_frames} needs a video autoencoder of this package, not "
                    f"{type(self.vae).__name__}: use max_latent_length"
                )
            return length
        if num_frames is not None:
            wanted = self.vae.latent_length(num_frames)
            if length not in (1, wanted):
                raise ValueError(
                    f"num_frames={num_frames} is {wanted} latent frames, but max_latent_length "
                    f"is {length}: give one of them"
                )
            return wanted
        if arguments.output_type != "latent":
            self.vae.latent_tiles(length)
        return length

    def _makes_videos(self) -> bool:
        is_image_vae = isinstance(self.vae, diffusers.AutoencoderKL)
        return self.transformer.config.video_base_size[0] > 1 and not is_image_vae

    def _pixel_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        size = self.transformer.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
    ) -> Tensor:
        """Raw text states of prompts and, with guidance on, of negative prompts.

        Args:
            prompt: One text or n.
            num_images_per_prompt: How often each row is repeated, consecutively.
            negative_prompt: One text for all, one a prompt, or None for empty ones.
            prompt_embeds: n text states in place of the prompts.
            negative_prompt_embeds: The same for the negative ones.

        Returns:
            (n, 2n with guidance, times num_images_per_prompt; num_tokens; width).

        Raises:
            ValueError: If counts differ, or texts and embeddings are mixed.
        """
        text_embed = self.transformer.text_embed
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            negatives = self._negative_texts(negative_prompt, len(prompts))
            if negative_prompt_embeds is not None:
                raise ValueError("negative_prompt_embeds need prompt_embeds, but texts are given")
            rows = prompts + negatives if self.guidance_scale > 1 else prompts
            states = text_embed.encode_prompts(rows)
        else:
            if negative_prompt:
                raise ValueError(
                    "negative_prompt is a text, but prompt_embeds are given: pass "
                    "negative_prompt_embeds"
                )
            states = self._pad_states(prompt_embeds, negative_prompt_embeds)
        return states.repeat_interleave(num_images_per_prompt, dim=0)

    @staticmethod
    def _negative_texts(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
        if not negative_prompt:
            return [""] * count
        if isinstance(negative_prompt, str):
            return [negative_prompt] * count
        if len(negative_prompt) != count:
            raise ValueError(
                f"there must be one negative prompt a prompt: got {len(negative_prompt)} for "
                f"{count} prompts"
            )
        return list(negative_prompt)

    def _pad_states(self, positive: Any, negative: Any) -> Tensor:
        """Given text states brought to the model's prompt length, negatives below positives."""
        text_embed = self.transformer.text_embed
        states = text_embed.encode_prompts(list(positive))
        if self.guidance_scale <= 1:
            return states
        if negative is None:
            null = text_embed.weight[: text_embed.num_tokens].expand_as(states)
            return torch.cat([states, null])
        if len(negative) != len(positive):
            raise ValueError(
                f"there must be one negative prompt a prompt: got {len(negative)} for "
                f"{len(positive)} prompts"
            )
        return torch.cat([states, text_embed.encode_prompts(list(negative))])

    def _first_latents(self, arguments: CallArguments, batch_size: int) -> list[Tensor]:
        """The latent frames that the video begins with, for every sample."""
        if arguments.latents is not None:
            return list(arguments.latents)
        if arguments.video is None:
            return self.prepare_latents(
                arguments.image, batch_size, arguments.generator, None, arguments.resize_mode
            )
        clips = self.image_processor.preprocess_video(
            arguments.video, *self._pixel_size(), arguments.resize_mode
        )
        x = self._encode_pixels(clips, batch_size, arguments.generator)
        return list(x.unbind(2))

    def prepare_latents(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Sequence[Tensor] | None = None,
        resize_mode: str = "crop",
    ) -> list[Tensor]:
        """The latent frames a video begins with: those given, the encoded image, or none.

        Args:
            image: As for :meth:`encode_image`.
            num_images_per_prompt: Samples to make of the image.
            generator: As for :meth:`encode_image`.
            latents: Scaled latent frames, (B, C, h, w) each.
            resize_mode: As for :meth:`encode_image`.
        """
        if latents is not None:
            return list(latents)
        if image is None:
            return []
        return [self.encode_image(image, num_images_per_prompt, generator, resize_mode)]

    def encode_image(
        self,
        image: Any,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        resize_mode: str = "crop",
    ) -> Tensor:
        """Pictures as a scaled latent frame.

        Args:
            image: One picture or several, see ``VaeImageProcessor.preprocess``.
            num_images_per_prompt: Samples to make of them, a multiple of their number.
            generator: Source of the posterior sample; with a list, each sample draws its own.
            resize_mode: What happens to pictures of another size than the model's.

        Returns:
            (num_images_per_prompt, C, h, w), the samples of one picture together.

        Raises:
            ValueError: If there are more pictures than samples, or they do not divide them.
        """
        pixels = self.image_processor.preprocess(image, *self._pixel_size(), resize_mode)
        return self._encode_pixels(pixels, num_images_per_prompt, generator)

    def _encode_pixels(self, pixels: Tensor, batch_size: int, generator: Generators) -> Tensor:
        """Scaled latents (batch_size, C, ...) of pixels, each repeated to fill the batch."""
        repeats, rest = divmod(batch_size, len(pixels))
        if rest or repeats == 0:
            raise ValueError(
                f"there must be one image or video for all prompts or one a prompt, got "
                f"{len(pixels)} for {batch_size} samples"
            )
        pixels = pixels.to(device=self._execution_device, dtype=self.vae.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        if isinstance(generator, list):
            moments = posterior.parameters.repeat_interleave(repeats, dim=0)
            return self.vae.scale_(self.vae.latent_dist(moments).sample(generator))
        latents = self.vae.scale_(posterior.sample(generator))
        return latents.repeat_interleave(repeats, dim=0)
