"""What all autoencoders share: posteriors and the scaling between raw and model latents.

Shapes: B batch, C latent channels, T latent frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders import vae
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffnext.models.autoencoders.tiling import TilingMixin
from diffnext.models.modeling_utils import StrictLoadingMixin
from diffnext.utils.arguments import CHECKED, Finite, Positive, take_checked
from diffnext.utils.host_data import draw_normal

__all__ = [
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "EncoderOutput",
    "IdentityDistribution",
    "LatentsMixin",
    "TilingMixin",
]

Generators = torch.Generator | list[torch.Generator] | None


class EncoderOutput(AutoencoderKLOutput):
    """What encoding a picture or video returns.

    Attributes:
        latent_dist: Posterior, with ``parameters``, ``sample(generator)`` and ``mode()``.
    """

    @property
    def latents(self) -> Tensor:
        """The posterior's mode; if the encoder gives points, the latents themselves."""
        return self.latent_dist.mode()


class DiagonalGaussianDistribution(vae.DiagonalGaussianDistribution):
    """Gaussian posterior of a VAE, q(z|x) = N(mean, diag(var)) (arXiv:1312.6114).

    diffusers' class, with statistics in float32 for moments of any dtype.

    Args:
        z: Moments, mean and log-variance concatenated on channels, (B, 2C, ...). With an odd
            channel count the last channel is one log-variance shared by all the others.
    """

    def __init__(self, z: Tensor) -> None:
        moments = z.float()
        if z.size(1) % 2:
            shared = moments[:, -1:].repeat_interleave(z.size(1) - 2, dim=1)
            moments = torch.cat([moments, shared], dim=1)
        super().__init__(moments)
        self.parameters = z
        self.device = z.device
        self.dtype = z.dtype

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw z = mean + std * eps.

        Args:
            generator: Source of eps; a list gives one generator per sample.

        Returns:
            Latents, (B, C, ...), in the dtype of the moments.

        Raises:
            ValueError: If a list holds another number of generators than there are samples.
        """
        if isinstance(generator, list) and len(generator) != len(self.mean):
            raise ValueError(
                f"generator must be one or one per sample, got {len(generator)} "
                f"for {len(self.mean)} samples"
            )
        eps = draw_normal(self.mean.shape, generator, self.mean)
        return (self.mean + self.std * eps).to(self.dtype)

    def mode(self) -> Tensor:
        """The mean, in the dtype of the moments."""
        return self.mean.to(self.dtype)


def return_input(self: Any, x: Tensor) -> Tensor:
    """Return the input."""
    return x


@dataclass(config=CHECKED, frozen=True)
class LatentScale:
    """The numbers of a config that :meth:`LatentsMixin.scale_` uses."""

    scaling_factor: Positive = 1.0
    shift_factor: Finite | None = None


class LatentsMixin(StrictLoadingMixin):
    """Posteriors and scaled latents of an autoencoder; put before diffusers' classes.

    Reads ``scaling_factor`` and ``shift_factor`` from the model's config. The trailing
    underscores are historical: nothing is changed in place.

    Attributes:
        latent_dist: Class of the posteriors; a batch of stored moments makes one.
        use_slicing: Whether samples are encoded and decoded one at a time.
    """

    latent_dist: type[DiagonalGaussianDistribution | IdentityDistribution] = (
        DiagonalGaussianDistribution
    )
    use_slicing: bool
    forward: Callable[..., Any] = return_input  # offload hooks attach here

    def register_to_config(self, **kwargs: Any) -> None:
        """Keep the arguments as the config.

        Raises:
            ValueError: If one that scales latents is not a number in range.
        """
        take_checked(LatentScale, dict(kwargs))
        super().register_to_config(**kwargs)

    def scale_(self, x: Tensor) -> Tensor:
        """Raw to model latents: (x - shift) * scaling."""
        if self.config["shift_factor"]:
            x = x - self.config["shift_factor"]
        return x * self.config["scaling_factor"]

    def unscale_(self, x: Tensor) -> Tensor:
        """Model to raw latents: x / scaling + shift."""
        x = x * (1.0 / self.config["scaling_factor"])
        return x + self.config["shift_factor"] if self.config["shift_factor"] else x

    def slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """One sample at a time when slicing is enabled."""
        return x.split(1) if self.use_slicing else (x,)

    def posterior(self, moments: Tensor, return_dict: bool) -> EncoderOutput | tuple:
        """What ``encode`` returns."""
        latent_dist = self.latent_dist(moments)
        return EncoderOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)
