"""Images of a class with NOVA.

Shapes: B samples, n prompts, C latent channels, h w latent size, H W pixels.
"""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.generation import GenerationPipelineMixin, StepCallback
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput, PipelineMixin

__all__ = ["NOVAC2IPipeline"]

Generators = torch.Generator | list[torch.Generator] | None


class NOVAC2IPipeline(GenerationPipelineMixin, PipelineMixin, DiffusionPipeline):
    """Generates images from class labels (arXiv:2412.14169).

    Args:
        transformer: A NOVA model without a text embedder.
        scheduler: Denoises tokens; a flow-matching or DDPM scheduler of diffusers or diffnext.
        vae: Decodes latents.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae"]
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: NOVATransformer3DModel = None,
        scheduler: SchedulerMixin = None,
        vae: ModelMixin = None,
        trust_remote_code: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self._setup_generation()

    @torch.no_grad()
    def __call__(
        self,
        prompt: int | Sequence[int] | None = None,
        num_inference_steps: int = 64,
        num_diffusion_steps: int = 25,
        guidance_scale: float = 5,
        min_guidance_scale: float | None = None,
        negative_prompt: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Any = None,
        disable_progress_bar: bool = False,
        output_type: str = "pil",
        *,
        guidance_trunc: float = 0,
        guidance_renorm: float = 1,
        vae_batch_size: int = 1,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **kwargs: Any,
    ) -> NOVAPipelineOutput | tuple[Any]:
        """Generate.

        Args:
            prompt: Class id, one or several.
            num_inference_steps: Autoregressive steps (sets of tokens).
            num_diffusion_steps: Denoising steps of each set.
            guidance_scale: Weight of the class; above 1 guidance is on.
            min_guidance_scale: Where the weight starts, growing to ``guidance_scale`` over the
                steps; None = constant.
            negative_prompt: Class to avoid, one for all or one a prompt; None is the null class.
            num_images_per_prompt: Samples of each class.
            generator: Source of randomness; a list gives each sample its own.
            latents: Must be absent: an image does not begin with given latents.
            disable_progress_bar: Whether to be silent.
            output_type: "pil", "np" (uint8), "pt" (-1 to 1) or "latent" (B, C, 1, h, w).
            guidance_trunc: As for :class:`NOVAPipeline`.
            guidance_renorm: As for :class:`NOVAPipeline`.
            vae_batch_size: Samples decoded at once.
            callback_on_step_end: As for :class:`NOVAPipeline`.
            callback_on_step_end_tensor_inputs: As for :class:`NOVAPipeline`.
            return_dict: Whether to name the result; else it is alone in a tuple.
            **kwargs: Ignored; names that the apps and scripts do not use give a warning.

        Returns:
            ``images``.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        self.warn_unknown(set(kwargs))
        self.check_run(output_type, vae_batch_size, callback_on_step_end_tensor_inputs)
        if latents:
            raise ValueError("an image of a class cannot begin with given latents")
        self.transformer.eval()  # before classes are embedded: training drops some
        self.guidance_scale = guidance_scale
        condition = self.encode_prompt(prompt, num_images_per_prompt, negative_prompt)
        inputs = {
            "c": [condition.to(self._execution_device)],
            "batch_size": len(condition) // (2 if guidance_scale > 1 else 1),
            "num_diffusion_steps": num_diffusion_steps,
            "guidance_scale": guidance_scale,
            "min_guidance_scale": min_guidance_scale,
            "guidance_trunc": guidance_trunc,
            "guidance_renorm": guidance_renorm,
            "generator": generator,
            **self.common_inputs(num_inference_steps, 1, disable_progress_bar),
        }
        inputs = self.start_run(inputs, callback_on_step_end, callback_on_step_end_tensor_inputs)
        try:
            x = self.decode(self.generate(inputs), vae_batch_size, output_type)
        finally:
            self.maybe_free_model_hooks()
        return self.package(x, "images", output_type, return_dict)

    def encode_prompt(
        self,
        prompt: int | Sequence[int],
        num_images_per_prompt: int = 1,
        negative_prompt: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Embed classes and, with guidance on, the classes to avoid.

        Args:
            prompt: Class id, one or n.
            num_images_per_prompt: How often each row is repeated, consecutively.
            negative_prompt: One class for all or one a prompt; None is the null class.

        Returns:
            (n, 2n with guidance, times num_images_per_prompt; 1; D).

        Raises:
            ValueError: If there is no such class, or counts differ.
        """
        if prompt is None:
            raise ValueError("prompt is None: give class ids")
        label_embed = self.transformer.label_embed
        if label_embed is None:
            raise ValueError("the transformer takes texts, not classes: use NOVAPipeline")
        classes = self._as_classes(prompt)
        if self.guidance_scale > 1:
            null = label_embed.num_classes
            negatives = self._as_classes(null if negative_prompt is None else negative_prompt)
            if len(negatives) not in (1, len(classes)):
                raise ValueError(
                    f"there must be one negative class a prompt: got {len(negatives)} for "
                    f"{len(classes)} prompts"
                )
            classes += negatives * (len(classes) if len(negatives) == 1 else 1)
        return label_embed(torch.tensor(classes)).repeat_interleave(num_images_per_prompt, dim=0)

    def _as_classes(self, value: Any) -> list[int]:
        """Class ids as a list; the null class is one of them.

        Raises:
            ValueError: If there is none, or one the model does not know.
        """
        ids = torch.as_tensor(value).reshape(-1)
        null = self.transformer.label_embed.num_classes
        if len(ids) == 0 or ids.is_floating_point() or not ((0 <= ids) & (ids <= null)).all():
            raise ValueError(f"classes must be whole numbers from 0 to {null}, got {value}")
        return ids.tolist()
