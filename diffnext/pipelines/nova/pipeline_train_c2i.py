"""Training of class-conditional image models.

Shapes: B samples.
"""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.pipelines.nova.training import TrainingPipelineMixin
from diffnext.pipelines.pipeline_utils import PipelineMixin

__all__ = ["NOVATrainC2IPipeline"]


class NOVATrainC2IPipeline(TrainingPipelineMixin, PipelineMixin, DiffusionPipeline):
    """Prepares NOVA and its batches for training from class labels and images.

    Args:
        transformer: The model to train, without a text embedder.
        scheduler: Its sampling scheduler; noise is added by diffnext's class of the same name.
        vae: Samples and scales cached posteriors.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae"]
    frozen_modules = ("label_embed.norm", "video_pos_embed", "video_encoder.patch_embed")

    def __init__(
        self,
        transformer: NOVATransformer3DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        trust_remote_code: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self._setup_training()

    def make_generation_pipeline(
        self, transformer: NOVATransformer3DModel, vae: Any
    ) -> NOVAC2IPipeline:
        """See :meth:`TrainingPipelineMixin.make_generation_pipeline`."""
        return NOVAC2IPipeline(transformer, self.scheduler, vae)

    def encode_prompt(self, inputs: dict[str, Any]) -> Tensor:
        """Class ids of a batch, (B,), on the device of the model, which drops some.

        Raises:
            ValueError: If the batch has no class ids, or unknown ones.
        """
        if "prompt" not in inputs:
            raise ValueError(f"a batch needs class ids as 'prompt', got {sorted(inputs)}")
        prompt = inputs["prompt"]
        if any(isinstance(value, str) for value in prompt):
            raise ValueError("class-conditional models train on records with a label, got captions")
        ids = torch.as_tensor(prompt).reshape(-1)
        if self.model.label_embed is None:
            raise ValueError("the transformer takes texts, not classes: use NOVATrainT2IPipeline")
        num_classes = self.model.label_embed.num_classes
        if ids.is_floating_point() or not ((0 <= ids) & (ids < num_classes)).all():
            raise ValueError(
                f"labels must be whole numbers from 0 to {num_classes - 1}, got {ids.tolist()}"
            )
        return ids.to(self.model.device)
