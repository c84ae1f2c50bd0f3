"""Training of text-to-image models."""

# Annotations of the constructor are read by diffusers: they must be classes, not strings.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.training import TextConditionMixin
from diffnext.pipelines.pipeline_utils import PipelineMixin

__all__ = ["NOVATrainT2IPipeline"]


class NOVATrainT2IPipeline(TextConditionMixin, PipelineMixin, DiffusionPipeline):
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
    frozen_modules: tuple[str, ...] = (
        "text_embed.norm",
        "video_pos_embed",
        "video_encoder.patch_embed",
        "motion_embed",
    )

    def __init__(
        self,
        transformer: NOVATransformer3DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
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
        self._setup_training()
