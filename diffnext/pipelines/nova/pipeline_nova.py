"""Text to image, text to video and image to video with NOVA.

Shapes: B samples, n prompts, C latent channels, h w latent size, T latent frames, H W pixels.
"""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
import logging
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffnext.image_processor import OUTPUT_TYPES, VaeImageProcessor
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.pipeline_utils import (
    NOVAPipelineOutput,
    PipelineMixin,
    cosine_set_sizes,
)

__all__ = ["NOVAPipeline"]

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None

# Further arguments that the model reads.
_MODEL_ARGUMENTS = {"fps", "min_guidance_scale"}
# Arguments of the apps and evaluation scripts that are theirs alone.
_TOLERATED_ARGUMENTS = {"seed", "randomize_seed", "progress", "num_images"}


class NOVAPipeline(PipelineMixin, DiffusionPipeline):
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
        self.image_processor = VaeImageProcessor()
        self.guidance_scale = 5.0
        if transformer is None:
            return
        transformer.sample_scheduler = scheduler
        if transformer.text_embed is not None:
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
        **kwargs: Any,
    ) -> NOVAPipelineOutput:
        """Generate.

        Args:
            prompt: What to draw, one text or several.
            num_inference_steps: Autoregressive steps (sets of tokens) a frame.
            num_diffusion_steps: Denoising steps of each set.
            max_latent_length: Latent frames T; 1 is an image. A video autoencoder with 4 frames
                a latent makes 4 (T - 1) + 1 frames.
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
            image: First frame, a PIL image or array (H, W, 3), 0 to 255, of the model's size.
            num_images_per_prompt: Samples of each prompt.
            generator: Source of randomness; a list gives each sample its own, so that its result
                does not depend on its neighbours.
            latents: Scaled latent frames the video begins with, each (B, C, h, w); they are
                left as they are and win over ``image``.
            prompt_embeds: Text states instead of prompts: a list of (k, D) or a (B, k, D) tensor.
            negative_prompt_embeds: The same for the negative prompts.
            disable_progress_bar: Whether to be silent.
            output_type: "pil", "np" (uint8), "pt" (-1 to 1) or "latent".
            **kwargs: ``vae_batch_size``, samples decoded at once (1); ``fps``, frames per second
                the motion is measured at (12); ``min_guidance_scale``, where ``guidance_scale``
                starts in each frame. Other names are ignored with a warning.

        Returns:
            ``images`` for pictures, ``frames`` for videos and for latents.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        vae_batch_size = kwargs.pop("vae_batch_size", 1)
        self._warn_unknown(kwargs)
        self._check_inputs(prompt, prompt_embeds, max_latent_length, flow_shift, output_type)
        self.guidance_scale = guidance_scale
        inputs = {
            **{name: kwargs[name] for name in _MODEL_ARGUMENTS & set(kwargs)},
            "num_diffusion_steps": num_diffusion_steps,
            "max_latent_length": max_latent_length,
            "guidance_scale": guidance_scale,
            "guidance_trunc": guidance_trunc,
            "guidance_renorm": guidance_renorm,
            "image_guidance_scale": image_guidance_scale,
            "spatiotemporal_guidance_scale": spatiotemporal_guidance_scale,
            "generator": generator,
        }
        num_tokens = int(np.prod(self.transformer.config.image_base_size))
        inputs["num_preds"] = cosine_set_sizes(num_inference_steps, num_tokens)
        inputs["tqdm1"] = max_latent_length > 1 and not disable_progress_bar
        inputs["tqdm2"] = max_latent_length == 1 and not disable_progress_bar
        inputs["prompt"] = self.encode_prompt(
            prompt, num_images_per_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        batch_size = len(inputs["prompt"]) // (2 if guidance_scale > 1 else 1)
        inputs["batch_size"] = batch_size
        inputs["motion_flow"] = [motion_flow] * batch_size
        inputs["latents"] = self.prepare_latents(image, batch_size, generator, latents)
        if flow_shift:
            self.scheduler.set_shift(flow_shift)
        x = self.transformer.eval()(inputs)["x"]
        if output_type != "latent":
            x = self.image_processor.decode_latents(self.vae, x, vae_batch_size)
        self.maybe_free_model_hooks()
        name = "images" if x.ndim == 4 else "frames"
        return NOVAPipelineOutput(**{name: self.image_processor.postprocess(x, output_type)})

    def _warn_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = sorted(set(kwargs) - _TOLERATED_ARGUMENTS - _MODEL_ARGUMENTS)
        if unknown:
            logger.warning("%s ignores unknown arguments: %s", type(self).__name__, unknown)

    def _check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Any,
        max_latent_length: int,
        flow_shift: float | None,
        output_type: str,
    ) -> None:
        """Reject what cannot work, before any work is done."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if prompt is None and prompt_embeds is None:
            raise ValueError("prompt is None: give a prompt, or prompt_embeds")
        if prompt_embeds is None and len(prompt) == 0 and not isinstance(prompt, str):
            raise ValueError("prompt is an empty list: give at least one prompt")
        if max_latent_length < 1:
            raise ValueError(f"max_latent_length must be at least 1, got {max_latent_length}")
        if max_latent_length > 1 and not self._makes_videos():
            raise ValueError(
                f"max_latent_length={max_latent_length} asks for a video, but this is an image "
                "model: use max_latent_length=1 or a video checkpoint"
            )
        if flow_shift and not hasattr(self.scheduler, "set_shift"):
            raise ValueError(
                f"flow_shift={flow_shift} needs a flow-matching scheduler, but the pipeline has "
                f"{type(self.scheduler).__name__}, which cannot be shifted"
            )

    def _makes_videos(self) -> bool:
        is_image_vae = isinstance(self.vae, diffusers.AutoencoderKL)
        return self.transformer.config.video_base_size[0] > 1 and not is_image_vae

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

    def prepare_latents(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The latent frames a video begins with: those given, the encoded image, or none.

        Args:
            image: As for :meth:`encode_image`.
            num_images_per_prompt: Samples to make of the image.
            generator: As for :meth:`encode_image`.
            latents: Scaled latent frames, (B, C, h, w) each.
        """
        if latents is not None:
            return list(latents)
        if image is None:
            return []
        return [self.encode_image(image, num_images_per_prompt, generator)]

    def encode_image(
        self, image: Any, num_images_per_prompt: int = 1, generator: Generators = None
    ) -> Tensor:
        """A picture as a scaled latent frame.

        Args:
            image: PIL image or array (H, W, 3), 0 to 255, of the model's size.
            num_images_per_prompt: Samples to make of it.
            generator: Source of the posterior sample; with a list, each sample draws its own.

        Returns:
            (num_images_per_prompt, C, h, w).

        Raises:
            ValueError: If the picture is of another size.
        """
        pixels = self._to_pixels(image).to(device=self._execution_device, dtype=self.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        if isinstance(generator, list):
            rows = [posterior.sample(one) for one in generator]
            return self.vae.scale_(torch.cat(rows))
        latent = self.vae.scale_(posterior.sample(generator))
        return latent.expand(num_images_per_prompt, -1, -1, -1)

    def _to_pixels(self, image: Any) -> Tensor:
        """(1, 3, H, W), -1 to 1."""
        array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
        size = self.transformer.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if array.shape != (height, width, 3):
            raise ValueError(
                f"image must be an RGB picture of {height}x{width} (height x width), the size "
                f"of the model, got an array of shape {array.shape}"
            )
        return torch.as_tensor(array).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)
