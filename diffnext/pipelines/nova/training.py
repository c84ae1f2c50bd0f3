"""What the training pipelines share: readying the model, and batches of cached latents.

Shapes: B samples, C latent channels, T latent frames, h w latent size, L prompt length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffnext.models.autoencoders.modeling_utils import LatentsMixin
from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.builder import build_diffusion_scheduler
from diffnext.pipelines.nova.pipeline_nova import NOVAPipeline
from diffnext.utils.host_data import send

__all__ = ["TextConditionMixin", "TrainingPipelineMixin"]


class TrainingPipelineMixin(ABC):
    """Prepares NOVA and its batches for training."""

    # Parts of the model that stay as they are.
    frozen_modules: tuple[str, ...] = ()

    transformer: NOVATransformer3DModel
    scheduler: Any
    vae: Any
    loss_repeat = 4

    def _set_up(self) -> None:
        """Make the scheduler that adds noise, at the end of the constructor.

        Raises:
            ValueError: If diffnext has no such scheduler or autoencoder.
        """
        if not isinstance(self.vae, LatentsMixin | None):
            name = type(self.vae).__name__
            raise ValueError(f"training needs an autoencoder of this package as vae, got {name}")
        self.noise_scheduler = build_diffusion_scheduler(self.scheduler)

    @property
    def model(self) -> NOVATransformer3DModel:
        """The model to train."""
        return self.transformer

    def configure_model(self, config: Any) -> NOVATransformer3DModel:
        """Make the model ready to be trained by calls on this pipeline's batches.

        Args:
            config: Training config, see :meth:`prepare_model`.

        Returns:
            The model in training mode, its frozen parts frozen. It preprocesses its batches by
            itself; inputs of a generation pass, as a model may be tried between two steps.
        """
        model = self.prepare_model(config)
        model.loss_repeat = self.loss_repeat
        model.pipeline_preprocess = lambda inputs: (
            self.preprocess(inputs) if model.training else inputs
        )
        return model

    def prepare_model(self, config: Any) -> NOVATransformer3DModel:
        """Make the model ready to be trained on what :meth:`preprocess` returns.

        Args:
            config: Training config; its ``model`` section gives ``gradient_checkpointing`` (0 to
                3, default 0), ``loss_repeat`` (default 4), ``context_noise`` (default 0) and
                ``mask_ratios``, arguments of :class:`diffnext.models.embeddings.MaskEmbed` (its
                defaults).

        Returns:
            The model in training mode, its frozen parts frozen.
        """
        model = self.model
        # A section of the typed tree, or a mapping such as OmegaConf's.
        section = config.model if isinstance(config.model, Mapping) else vars(config.model)
        model.set_gradient_checkpointing(section.get("gradient_checkpointing", 0))
        self.loss_repeat = section.get("loss_repeat", 4)
        model.context_noise = section.get("context_noise", 0.0)
        if section.get("mask_ratios"):
            model.mask_embed.mask_ratios = list(section["mask_ratios"])
        modules = dict(model.named_modules())
        for name in self.frozen_modules:
            if name in modules:
                modules[name].requires_grad_(False)
        return model.train()

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of the loader into inputs of the model.

        Args:
            inputs: ``latents``, posterior moments (B, 2C, h, w) or (B, 2C, T, h, w), or ready
                ``x``; ``prompt``, what :meth:`encode_prompt` takes; other keys pass.

        Returns:
            ``x``, freshly sampled scaled latents; ``prompt``; ``noise_scheduler`` and
            ``loss_repeat``; the other keys.

        Raises:
            RuntimeError: If the model is not in training mode.
        """
        if not self.model.training:
            raise RuntimeError("a training pipeline preprocesses batches in training mode only")
        outputs = {"noise_scheduler": self.noise_scheduler, "loss_repeat": self.loss_repeat}
        outputs.update(inputs)
        outputs["x"] = self.prepare_latents(outputs)
        outputs["prompt"] = self.encode_prompt(outputs)
        return outputs

    def prepare_latents(self, inputs: dict[str, Any]) -> Tensor:
        """Sample scaled latents from the cached moments; takes them out of ``inputs``.

        Raises:
            NotImplementedError: For pixels: only cached moments can be trained on.
            ValueError: If there are no moments, nor ready latents ``x``.
        """
        if "images" in inputs:
            raise NotImplementedError("training takes cached VAE moments ('latents'), not 'images'")
        if "latents" not in inputs:
            if "x" not in inputs:
                raise ValueError(f"a batch needs 'latents', got {sorted(inputs)}")
            return inputs["x"]
        moments = torch.as_tensor(inputs.pop("latents"))
        if not moments.is_floating_point():
            raise ValueError(f"latents must be floating-point moments, got {moments.dtype}")
        moments = send(moments, self.model.device).to(self.model.dtype)
        posterior = self.vae.latent_dist(moments)
        return self.vae.scale_(posterior.sample())

    @abstractmethod
    def make_generation_pipeline(self, transformer: NOVATransformer3DModel, vae: Any) -> Any:
        """A pipeline that generates with these two and the other components.

        Args:
            transformer: The model being trained, or a copy of it.
            vae: Autoencoder to decode with.
        """

    @abstractmethod
    def encode_prompt(self, inputs: dict[str, Any]) -> Tensor | None:
        """What the model is to read for the ``prompt`` of a batch."""


class TextConditionMixin(TrainingPipelineMixin):
    """Training on prompts: texts, which the text encoder reads, or cached text states."""

    text_encoder: Any
    tokenizer: Any

    def make_generation_pipeline(
        self, transformer: NOVATransformer3DModel, vae: Any
    ) -> NOVAPipeline:
        """See :meth:`TrainingPipelineMixin.make_generation_pipeline`."""
        return NOVAPipeline(transformer, self.scheduler, vae, self.text_encoder, self.tokenizer)

    def encode_prompt(self, inputs: dict[str, Any]) -> Tensor | None:
        """Raw text states of the prompts of a batch, some of them dropped.

        Returns:
            (B, L, width), or None for a batch without prompts.
        """
        text_embed = self.model.text_embed
        prompts = inputs.get("prompt")
        if prompts is None or text_embed is None:
            return None
        if all(isinstance(prompt, str) for prompt in prompts):
            length, width = text_embed.num_tokens, text_embed.token_dim
            prompts = encode_texts(self.tokenizer, self.text_encoder, prompts, length, width)
        return text_embed.drop_states(text_embed.pad_states(prompts))
