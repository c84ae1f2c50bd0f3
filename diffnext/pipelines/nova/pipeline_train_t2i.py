"""Training of text-to-image models.

Shapes: B samples, C latent channels, h w latent size, T latent frames.
"""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.builder import build_diffusion_scheduler
from diffnext.pipelines.pipeline_utils import PipelineMixin

__all__ = ["NOVATrainT2IPipeline"]


class NOVATrainT2IPipeline(PipelineMixin, DiffusionPipeline):
    """Prepares NOVA and its batches for training from text and images.

    Args:
        transformer: The model to train.
        scheduler: Its sampling scheduler; noise is added by diffnext's class of the same name.
        vae: Samples and scales cached posteriors.
        text_encoder: Encodes prompts that are cached as text.
        tokenizer: Of the text encoder.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"]
    # Parts of the model that stay as they are.
    frozen_modules = (
        "text_embed.norm",
        "video_pos_embed",
        "video_encoder.patch_embed",
        "motion_embed",
    )

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
        self.guidance_scale = 5.0
        if transformer is not None:
            transformer.noise_scheduler = build_diffusion_scheduler(scheduler)
            transformer.sample_scheduler = scheduler

    @property
    def model(self) -> NOVATransformer3DModel:
        """The model to train."""
        return self.transformer

    def configure_model(self, config: Any) -> NOVATransformer3DModel:
        """Make the model ready to be trained on this pipeline's batches.

        Args:
            config: Training config; its ``model`` section gives ``gradient_checkpointing`` (0 to
                3, default 0) and ``loss_repeat`` (default 4).

        Returns:
            The model in training mode, its frozen parts frozen.
        """
        model = self.model
        model.set_gradient_checkpointing(config.model.get("gradient_checkpointing", 0))
        model.loss_repeat = config.model.get("loss_repeat", 4)
        modules = dict(model.named_modules())
        for name in self.frozen_modules:
            if name in modules:
                modules[name].requires_grad_(False)
        if model.text_embed is not None:
            model.text_embed.encoders = [self.tokenizer, self.text_encoder]
        model.pipeline_preprocess = self.preprocess
        return model.train()

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of the loader into inputs of the model.

        Args:
            inputs: ``latents``, posterior moments (B, 2C, h, w) or (B, 2C, T, h, w); ``prompt``,
                texts or text states; other keys pass.

        Returns:
            ``x``, freshly sampled scaled latents; ``c``, condition tokens; the other keys.

        Raises:
            RuntimeError: If the model is not in training mode.
        """
        if not self.model.training:
            raise RuntimeError("a training pipeline preprocesses batches in training mode only")
        outputs = dict(inputs)
        outputs["x"] = self.prepare_latents(outputs)
        outputs["c"] = self.encode_prompt(outputs)
        return outputs

    def prepare_latents(self, inputs: dict[str, Any]) -> Tensor:
        """Sample scaled latents from the cached moments; takes them out of ``inputs``.

        Raises:
            NotImplementedError: For pixels: only cached moments can be trained on.
            ValueError: If there are no moments.
        """
        if "images" in inputs:
            raise NotImplementedError("training takes cached VAE moments ('latents'), not 'images'")
        if "latents" not in inputs:
            raise ValueError(f"a batch needs 'latents', got {sorted(inputs)}")
        moments = torch.as_tensor(inputs.pop("latents"), device=self.model.device)
        if not moments.is_floating_point():
            raise ValueError(f"latents must be floating-point moments, got {moments.dtype}")
        posterior = self.vae.latent_dist(moments.to(self.model.dtype))
        return self.vae.scale_(posterior.sample())

    def encode_prompt(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Condition tokens of the prompts, behind any given; takes prompts out of ``inputs``."""
        tokens = list(inputs.get("c") or [])
        if "prompt" in inputs and self.model.text_embed is not None:
            tokens.append(self.model.text_embed(inputs.pop("prompt")))
        return tokens
