"""The constructors of the pipelines: the components of a NOVA of texts, and of one of classes."""

# Annotations of the constructors are read by diffusers: they must be classes, not strings.
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.pipeline_utils import PipelineMixin

__all__ = ["ClassComponents", "TextComponents"]


class ClassComponents(PipelineMixin):
    """Components of a pipeline of classes.

    Args:
        transformer: A NOVA model without a text embedder.
        scheduler: Denoises tokens; a flow-matching or DDPM scheduler of diffusers or diffnext.
        vae: The autoencoder of the latents.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae"]

    def __init__(
        self,
        transformer: NOVATransformer3DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        trust_remote_code: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self._set_up()

    def _set_up(self) -> None:
        """Prepare what a kind of pipeline needs of its components."""


class TextComponents(ClassComponents):
    """Components of a pipeline of texts.

    Args:
        transformer: A NOVA model with a text embedder.
        scheduler: Denoises tokens; a flow-matching or DDPM scheduler of diffusers or diffnext.
        vae: The autoencoder of the latents.
        text_encoder: Encodes prompts; not needed when embeddings are passed.
        tokenizer: The text encoder's tokenizer.
        trust_remote_code: Ignored; older diffusers releases pass it on.
    """

    _optional_components = ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"]

    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        transformer: NOVATransformer3DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = True,
    ) -> None:
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        super().__init__(transformer, scheduler, vae)
