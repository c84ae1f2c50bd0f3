"""Training of text-to-video models."""

from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline

__all__ = ["NOVATrainT2VPipeline"]


class NOVATrainT2VPipeline(NOVATrainT2IPipeline):
    """Prepares NOVA and its batches for training from text and videos.

    As for images, but what reads earlier frames is trained as well. Arguments as for
    :class:`NOVATrainT2IPipeline`.
    """

    frozen_modules = ("text_embed.norm", "motion_embed")
