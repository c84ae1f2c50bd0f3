"""Training of text-to-image models."""

from diffnext.pipelines.nova.components import TextComponents
from diffnext.pipelines.nova.training import TextConditionMixin

__all__ = ["NOVATrainT2IPipeline"]


class NOVATrainT2IPipeline(TextConditionMixin, TextComponents):
    """Prepares NOVA and its batches for training from text and images.

    Its components: :class:`~diffnext.pipelines.nova.components.TextComponents`. diffnext's
    scheduler of the same name adds the noise.
    """

    frozen_modules: tuple[str, ...] = (
        "text_embed.norm",
        "video_pos_embed",
        "video_encoder.patch_embed",
        "motion_embed",
    )
