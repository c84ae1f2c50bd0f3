"""The released NOVA architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from diffnext.models.diffusion_mlp import DiffusionMLP
from diffnext.models.embeddings import (
    LabelEmbed,
    MaskEmbed,
    MotionEmbed,
    PosEmbed,
    RotaryEmbed3D,
    TextEmbed,
    VideoPosEmbed,
)
from diffnext.models.modeling_utils import StrictLoadingMixin
from diffnext.models.normalization import AdaLayerNorm
from diffnext.models.transformers.transformer_3d import Transformer3DModel
from diffnext.models.vision_transformer import VisionTransformer
from diffnext.utils.registry import Registry

__all__ = [
    "IMAGE_DECODERS",
    "IMAGE_ENCODERS",
    "VIDEO_ENCODERS",
    "NOVATransformer3DModel",
    "image_decoder",
    "image_encoder",
    "video_encoder",
]

VIDEO_ENCODERS = Registry("video_encoders")
IMAGE_ENCODERS = Registry("image_encoders")
IMAGE_DECODERS = Registry("image_decoders")


def _register_each(
    registry: Registry, prefix: str, entries: dict[str, dict[str, int]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register one constructor under several sizes."""

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        for size, kwargs in entries.items():
            registry.register(prefix + size, func, **kwargs)
        return func

    return decorate


@_register_each(
    VIDEO_ENCODERS,
    "vit_",
    {
        "d16w768": {"depth": 16, "embed_dim": 768, "num_heads": 12},
        "d16w1024": {"depth": 16, "embed_dim": 1024, "num_heads": 16},
        "d16w1536": {"depth": 16, "embed_dim": 1536, "num_heads": 16},
        "d2w64": {"depth": 2, "embed_dim": 64, "num_heads": 2},
        "d3w128": {"depth": 3, "embed_dim": 128, "num_heads": 4},
        "d3w192": {"depth": 3, "embed_dim": 192, "num_heads": 3},
        "d4w256": {"depth": 4, "embed_dim": 256, "num_heads": 4},
    },
)
def video_encoder(**kwargs: Any) -> VisionTransformer:
    """Encoder of text and earlier frames; arguments of :class:`VisionTransformer`."""
    return VisionTransformer(**kwargs)


@_register_each(
    IMAGE_ENCODERS,
    "vit_",
    {
        "d32w768": {"depth": 32, "embed_dim": 768, "num_heads": 12},
        "d32w1024": {"depth": 32, "embed_dim": 1024, "num_heads": 16},
        "d32w1536": {"depth": 32, "embed_dim": 1536, "num_heads": 16},
        "d4w64": {"depth": 4, "embed_dim": 64, "num_heads": 2},
        "d6w128": {"depth": 6, "embed_dim": 128, "num_heads": 4},
        "d6w192": {"depth": 6, "embed_dim": 192, "num_heads": 3},
        "d8w256": {"depth": 8, "embed_dim": 256, "num_heads": 4},
    },
)
def image_encoder(**kwargs: Any) -> VisionTransformer:
    """Encoder of the tokens of one frame; arguments of :class:`VisionTransformer`."""
    return VisionTransformer(**kwargs)


@_register_each(
    IMAGE_DECODERS,
    "mlp_",
    {
        "d3w1280": {"depth": 3, "embed_dim": 1280},
        "d6w768": {"depth": 6, "embed_dim": 768},
        "d6w1024": {"depth": 6, "embed_dim": 1024},
        "d6w1536": {"depth": 6, "embed_dim": 1536},
        "d2w64": {"depth": 2, "embed_dim": 64},
        "d3w192": {"depth": 3, "embed_dim": 192},
        "d3w256": {"depth": 3, "embed_dim": 256},
    },
)
def image_decoder(**kwargs: Any) -> DiffusionMLP:
    """Denoiser of single tokens; arguments of :class:`DiffusionMLP`."""
    return DiffusionMLP(**kwargs)


class NOVATransformer3DModel(
    StrictLoadingMixin, Transformer3DModel, ModelMixin, ConfigMixin, PeftAdapterMixin
):
    """NOVA by its config (arXiv:2412.14169).

    Args:
        image_dim: Latent channels.
        image_size: Picture size (height, width) in pixels, or a side.
        image_stride: Pixels a latent, in each direction.
        text_token_dim: Width of the text encoder's states; None for class-conditional models.
        text_token_len: Length of prompts in tokens.
        image_base_size: Token grid of the image encoder.
        video_base_size: Frames and token grid of the video encoder; more than one frame makes a
            video model.
        video_mixer_rank: Rank of the mixer between the first frame's states and a later one's;
            negative is full rank, None or 0 no mixer.
        rotary_pos_embed: Rotary positions in place of fixed tables.
        arch: Names of video encoder, image encoder and diffusion head in the registries.
    """

    @register_to_config
    def __init__(
        self,
        image_dim: int | None = None,
        image_size: int | Sequence[int] | None = None,
        image_stride: int | None = None,
        text_token_dim: int | None = None,
        text_token_len: int | None = None,
        image_base_size: Sequence[int] | None = None,
        video_base_size: Sequence[int] | None = None,
        video_mixer_rank: int | None = None,
        rotary_pos_embed: bool = False,
        arch: Sequence[str] = ("", "", ""),
    ) -> None:
        image_size = (image_size,) * 2 if isinstance(image_size, int) else image_size
        latent_size = tuple(side // image_stride for side in image_size)
        patch_size = 15 // image_stride + 1
        sizes = {"image_size": latent_size, "image_dim": image_dim}
        video_name, image_name, decoder_name = arch
        video = VIDEO_ENCODERS.get(video_name)(patch_size=patch_size * 2, **sizes)
        image = IMAGE_ENCODERS.get(image_name)(patch_size=patch_size, **sizes)
        decoder = IMAGE_DECODERS.get(decoder_name)(
            patch_size=patch_size, image_dim=image_dim, cond_dim=image.embed_dim
        )
        width = video.embed_dim
        if rotary_pos_embed:
            video_pos = RotaryEmbed3D(video.rope.dim, video_base_size[1:])
            image_pos = RotaryEmbed3D(image.rope.dim, image_base_size)
        else:
            video_pos = VideoPosEmbed(width, video_base_size)
            image_pos = None
            image.pos_embed = PosEmbed(image.embed_dim, image_base_size)
        if video_mixer_rank:
            video.mixer = AdaLayerNorm(width, rank=max(video_mixer_rank, 0), eps=None)
        has_text = bool(text_token_dim)
        super().__init__(
            video_encoder=video,
            image_encoder=image,
            image_decoder=decoder,
            mask_embed=MaskEmbed(width),
            text_embed=TextEmbed(text_token_dim, width, text_token_len) if has_text else None,
            label_embed=None if has_text else LabelEmbed(width),
            video_pos_embed=video_pos,
            image_pos_embed=image_pos,
            motion_embed=MotionEmbed(width) if video_base_size[0] > 1 else None,
        )
