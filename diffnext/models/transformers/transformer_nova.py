"""The released NOVA architectures."""

from __future__ import annotations

from collections.abc import Sequence
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


def video_encoder(**kwargs: Any) -> VisionTransformer:
    """Encoder of text and earlier frames; arguments of :class:`VisionTransformer`."""
    return VisionTransformer(**kwargs)


def image_encoder(**kwargs: Any) -> VisionTransformer:
    """Encoder of the tokens of one frame; arguments of :class:`VisionTransformer`."""
    return VisionTransformer(**kwargs)


def image_decoder(**kwargs: Any) -> DiffusionMLP:
    """Denoiser of single tokens; arguments of :class:`DiffusionMLP`."""
    return DiffusionMLP(**kwargs)


# Depths of both encoders, width and heads: the released sizes, then small ones.
for _video_depth, _image_depth, _width, _heads in (
    *((16, 32, 768, 12), (16, 32, 1024, 16), (16, 32, 1536, 16)),
    *((2, 4, 64, 2), (3, 6, 128, 4), (3, 6, 192, 3), (4, 8, 256, 4)),
):
    for _registry, _encoder, _depth in (
        (VIDEO_ENCODERS, video_encoder, _video_depth),
        (IMAGE_ENCODERS, image_encoder, _image_depth),
    ):
        _size = {"depth": _depth, "embed_dim": _width, "num_heads": _heads}
        _registry.register(f"vit_d{_depth}w{_width}", _encoder, **_size)
for _depth, _width in ((3, 1280), (6, 768), (6, 1024), (6, 1536), (2, 64), (3, 192), (3, 256)):
    _name = f"mlp_d{_depth}w{_width}"
    IMAGE_DECODERS.register(_name, image_decoder, depth=_depth, embed_dim=_width)


class NOVATransformer3DModel(
    StrictLoadingMixin, Transformer3DModel, ModelMixin, ConfigMixin, PeftAdapterMixin
):
    """NOVA, built from its config (arXiv:2412.14169).

    Args:
        image_dim: Latent channels.
        image_size: Picture size (height, width) in pixels, or a side.
        image_stride: Pixels per latent, in each direction.
        text_token_dim: Width of the text encoder's states; None for class-conditional models.
        text_token_len: Length of prompts in tokens.
        image_base_size: Token grid of the image encoder.
        video_base_size: Frames and token grid of the video encoder; more than one frame makes a
            video model.
        video_mixer_rank: Rank of the mixer between the first frame's states and a later one's;
            negative is full rank, None or 0 no mixer.
        rotary_pos_embed: Rotary positions instead of fixed tables.
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
        if not (image_dim and image_size and image_stride and image_base_size and video_base_size):
            sizes = (image_dim, image_size, image_stride, image_base_size, video_base_size)
            raise ValueError(
                "image_dim, image_size, image_stride, image_base_size and video_base_size are "
                f"needed, got {sizes}"
            )
        image_size = (image_size,) * 2 if isinstance(image_size, int) else image_size
        latent_size = tuple(side // image_stride for side in image_size)
        patch_size = 15 // image_stride + 1
        size = {"image_size": latent_size, "image_dim": image_dim}
        video_name, image_name, decoder_name = arch
        video = VIDEO_ENCODERS.get(video_name)(patch_size=patch_size * 2, **size)
        image = IMAGE_ENCODERS.get(image_name)(patch_size=patch_size, **size)
        decoder = IMAGE_DECODERS.get(decoder_name)(
            patch_size=patch_size, image_dim=image_dim, cond_dim=image.embed_dim
        )
        width = video.embed_dim
        video_pos: VideoPosEmbed | RotaryEmbed3D
        if rotary_pos_embed:
            video_pos = RotaryEmbed3D(video.rope.dim, video_base_size[1:])
            image_pos = RotaryEmbed3D(image.rope.dim, image_base_size)
        else:
            video_pos = VideoPosEmbed(width, video_base_size)
            image_pos = None
            image.pos_embed = PosEmbed(image.embed_dim, image_base_size)
        if video_mixer_rank:
            video.mixer = AdaLayerNorm(width, rank=max(video_mixer_rank, 0), eps=None)
        length = 256 if text_token_len is None else text_token_len
        text = TextEmbed(text_token_dim, width, length) if text_token_dim else None
        super().__init__(
            video_encoder=video,
            image_encoder=image,
            image_decoder=decoder,
            mask_embed=MaskEmbed(width),
            text_embed=text,
            label_embed=None if text else LabelEmbed(width),
            video_pos_embed=video_pos,
            image_pos_embed=image_pos,
            motion_embed=MotionEmbed(width) if video_base_size[0] > 1 else None,
        )
