"""The image autoencoder of the Stable Diffusion family: 8x8 pixels to one latent.

Shapes: B batch, C latent channels, H W pixels, h w latent size (H/8, W/8 with four levels).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, cat, nn

from diffnext.models.autoencoders.modeling_utils import (
    DecoderOutput,
    EncoderOutput,
    Generators,
    IdentityDistribution,
    LatentsMixin,
)

__all__ = ["AutoencoderKL"]


# diffusers finds a class's loader by the base class in the namespace of its module.
class AutoencoderKL(LatentsMixin, autoencoder_kl.AutoencoderKL, ModelMixin):
    """KL-regularised image autoencoder (latent diffusion, arXiv:2112.10752).

    diffusers' class with this package's defaults, float32 posteriors and single-frame videos.
    ``down_block_types``, ``up_block_types``, ``act_fn`` and ``norm_num_groups`` are accepted for
    the sake of released configs; the network always has 2-D blocks, SiLU and 32 groups.

    Args:
        in_channels: Channels of the pictures.
        out_channels: Channels of the reconstructions.
        down_block_types: Ignored.
        up_block_types: Ignored.
        block_out_channels: Width of each level; every level but the last halves the size.
        layers_per_block: Residual blocks per encoder level; the decoder has one more.
        act_fn: Ignored.
        latent_channels: Channels C of the latents.
        norm_num_groups: Ignored.
        sample_size: Picture size the model was trained at; the tile size of spatial tiling.
        scaling_factor: Multiplier that brings latents to unit variance.
        shift_factor: Mean of the latents, subtracted before scaling.
        latents_mean: Ignored.
        latents_std: Ignored.
        force_upcast: Kept in the config for pipelines: whether float16 ones decode in float32.
        double_z: Whether the encoder gives a mean and a log-variance, or a point.
        use_quant_conv: Whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1x1 convolution precedes the decoder.
        mid_block_add_attention: Whether the middle blocks attend over positions.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        sample_size: int = 1024,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        double_z: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        levels = len(block_out_channels)
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        if not double_z:
            self.latent_dist = IdentityDistribution
            self.encoder.conv_out = nn.Conv2d(block_out_channels[-1], latent_channels, 3, padding=1)
            if use_quant_conv:
                self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple:
        """Encode pictures.

        Args:
            x: Pictures, (B, 3, H, W), -1 to 1.
            return_dict: Whether to wrap the result in a named output.

        Returns:
            ``latent_dist``, a posterior with ``parameters`` (B, 2C, h, w).

        Raises:
            ValueError: If ``x`` is not a batch of pictures with the right channels.
        """
        channels = self.config["in_channels"]
        if x.ndim != 4 or x.size(1) != channels:
            raise ValueError(f"pictures must be (B, {channels}, H, W), got {tuple(x.shape)}")
        moments = cat([self._encode(part) for part in self.slices(x)])
        return self.posterior(moments, return_dict)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple:
        """Decode latents.

        Args:
            z: Unscaled latents, (B, C, h, w), or one frame of a video, (B, C, 1, h, w).
            return_dict: Whether to wrap the result in a named output.
            generator: Ignored, as by diffusers' class, whose pipelines pass it.

        Returns:
            ``sample``: pictures, (B, 3, H, W).

        Raises:
            ValueError: If ``z`` holds more than one frame, or the wrong channels.
        """
        channels = self.config["latent_channels"]
        picture = z.squeeze(2) if z.ndim == 5 else z
        if picture.ndim != 4 or z.size(1) != channels:
            raise ValueError(
                f"latents must be (B, {channels}, h, w) or (B, {channels}, 1, h, w), "
                f"got {tuple(z.shape)}"
            )
        return super().decode(picture, return_dict=return_dict)
