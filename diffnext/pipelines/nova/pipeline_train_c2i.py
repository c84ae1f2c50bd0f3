"""Training of class-conditional image models.

Shapes: B samples.
"""

from typing import Any

import torch
from torch import Tensor

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.components import ClassComponents
from diffnext.pipelines.nova.pipeline_nova_c2i import NOVAC2IPipeline
from diffnext.pipelines.nova.training import TrainingPipelineMixin
from diffnext.utils.host_data import send

__all__ = ["NOVATrainC2IPipeline"]


class NOVATrainC2IPipeline(TrainingPipelineMixin, ClassComponents):
    """Prepares NOVA and its batches for training from class labels and images.

    Its components: :class:`~diffnext.pipelines.nova.components.ClassComponents`. diffnext's
    scheduler of the same name adds the noise.
    """

    frozen_modules = ("label_embed.norm", "video_pos_embed", "video_encoder.patch_embed")

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
        return send(ids, self.model.device)
