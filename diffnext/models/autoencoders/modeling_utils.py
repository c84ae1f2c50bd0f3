"""What all autoencoders share: posteriors and the scaling between raw and model latents.

Shapes: B batch, C latent channels, T latent frames, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffnext.models.autoencoders.tiling import TilingMixin

__all__ = [
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "IdentityDistribution",
    "LatentScalingMixin",
    "TilingMixin",
]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class DecoderOutput(BaseOutput):
    """Pixels of a decoded latent.

    Attributes:
        sample: (B, 3, H, W) or (B, 3, F, H, W), about -1 to 1.
    """

    sample: Tensor


class IdentityDistribution:
    """A posterior without noise, for autoencoders that encode to a point.

    Args:
        z: The latents, (B, C, ...).
    """

    def __init__(self, z: Tensor) -> None:
        self.parameters = z

    def sample(self, generator: Generators = None) -> Tensor:
        """Return the latents; nothing is drawn."""
        return self.parameters


class DiagonalGaussianDistribution:
    """Gaussian posterior of a VAE, q(z|x) = N(mean, diag(var)) (arXiv:1312.6114).

    Statistics are float32 whatever the dtype of the moments.

    Args:
        z: Moments, mean and log-variance concatenated on channels, (B, 2C, ...). With an odd
            channel count the last channel is one log-variance shared by all the others.
    """

    def __init__(self, z: Tensor) -> None:
        self.parameters = z
        self.device = z.device
        self.dtype = z.dtype
        if z.size(1) % 2:
            means = z.size(1) - 1
            shared = z[:, -1:].expand(-1, means, *z.shape[2:])
            z = torch.cat([z[:, :means], shared], dim=1)
        self.mean, logvar = z.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw z = mean + std * eps.

        Args:
            generator: Source of eps; a list gives one generator per sample.

        Returns:
            Latents, (B, C, ...), in the dtype of the moments.
        """
        eps = randn_tensor(
            self.mean.shape, generator=generator, device=self.device, dtype=torch.float32
        )
        return (self.mean + self.std * eps).to(self.dtype)


class LatentScalingMixin:
    """Scaling between raw VAE latents and the unit-variance latents that NOVA models.

    Reads ``scaling_factor`` and ``shift_factor`` from the model's config. The trailing
    underscores are historical: nothing is changed in place.
    """

    def scale_(self, x: Tensor) -> Tensor:
        """Raw to model latents: (x - shift) * scaling."""
        if self.config.shift_factor:
            x = x - self.config.shift_factor
        return x * self.config.scaling_factor

    def unscale_(self, x: Tensor) -> Tensor:
        """Model to raw latents: x / scaling + shift."""
        x = x * (1.0 / self.config.scaling_factor)
        return x + self.config.shift_factor if self.config.shift_factor else x
