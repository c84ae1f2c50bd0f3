"""Classifier-free guidance over two or three passes (arXiv:2207.12598).

Shapes: B batch, P passes; guided batches are pass-major: pass 0 of all samples, then pass 1, ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GuidanceScaler"]


class GuidanceScaler:
    """Weights of the guided passes. Immutable: methods return new scalers.

    With guidance, pass 0 is conditional and the last text-free one unconditional. A third pass
    is either the prompt-free prediction with earlier frames seen (image guidance) or a perturbed
    conditional one (spatiotemporal guidance). NOVA perturbs no block, so the spatiotemporal pass
    equals the conditional one and changes nothing; it is accepted and costs half as much again.

    Args:
        guidance_scale: Weight of the prompt; 1 or less is no guidance.
        guidance_trunc: Guidance stops at diffusion timesteps below this; 0 = never.
        guidance_renorm: Least ratio that the norm may be brought down to; 1 = off.
        image_guidance_scale: Weight of the earlier frames, 0 = off.
        spatiotemporal_guidance_scale: Weight of the perturbed pass, 0 = off.
        min_guidance_scale: Weight at the start of a frame, growing to ``guidance_scale`` over
            its steps; None = constant.
        guidance_interval: Least and greatest diffusion timestep of guidance, for instance
            (100, 900); None = all (arXiv:2404.07724).
        guidance_reuse: Sets of tokens that share the image encoder's states of all passes but the
            conditional one; 1 = every set has its own (the condition cache of LazyMAR,
            arXiv:2503.12450).
        **unused: Other sampling arguments, ignored.

    Raises:
        ValueError: If image and spatiotemporal guidance are both asked for, the interval is
            empty, or states are to be reused for less than one set.
    """

    def __init__(
        self,
        guidance_scale: float = 1,
        guidance_trunc: float = 0,
        guidance_renorm: float = 1,
        image_guidance_scale: float = 0,
        spatiotemporal_guidance_scale: float = 0,
        min_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_reuse: int = 1,
        **unused: Any,
    ) -> None:
        if guidance_interval is not None and not guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(
                "guidance_interval must be the least and the greatest timestep, got "
                f"{tuple(guidance_interval)}"
            )
        if guidance_reuse < 1:
            raise ValueError(f"guidance_reuse must be at least 1 set, got {guidance_reuse}")
        if image_guidance_scale and spatiotemporal_guidance_scale:
            raise ValueError(
                "image and spatiotemporal guidance cannot be combined, got scales "
                f"{image_guidance_scale} and {spatiotemporal_guidance_scale}"
            )
        self.guidance_scale = guidance_scale
        self.guidance_trunc = guidance_trunc
        self.guidance_renorm = guidance_renorm
        self.guidance_interval = guidance_interval
        self.guidance_reuse = guidance_reuse
        self.min_guidance_scale = (
            guidance_scale if min_guidance_scale is None else min_guidance_scale
        )
        # Extra guidance needs the unconditional pass: without guidance it is off.
        is_guided = guidance_scale > 1
        self.image_guidance_scale = image_guidance_scale if is_guided else 0
        self.spatiotemporal_guidance_scale = spatiotemporal_guidance_scale if is_guided else 0
        # Fixed by the full scale: a weight that passes 1 on its way keeps the same batch.
        self.num_passes = (3 if self.extra_pass else 2) if is_guided else 1

    @property
    def extra_pass(self) -> bool:
        """Whether there is a third pass."""
        return self.image_guidance_scale + self.spatiotemporal_guidance_scale > 0

    def scale_at(self, progress: float) -> float:
        """Weight of the prompt once ``progress`` (0 to 1) of the frame's steps are done."""
        return self.min_guidance_scale + (self.guidance_scale - self.min_guidance_scale) * progress

    def is_truncated(self, timestep: float) -> bool:
        """Whether guidance is off at a diffusion timestep and all later, smaller ones."""
        return self.num_passes > 1 and 0 < self.guidance_trunc and timestep < self.guidance_trunc

    def is_off(self, timestep: float) -> bool:
        """Whether guidance is off at a diffusion timestep."""
        if self.num_passes == 1:
            return False
        interval = self.guidance_interval
        is_outside = interval is not None and not interval[0] <= timestep <= interval[1]
        return is_outside or self.is_truncated(timestep)

    def expand(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Repeat a batch for every pass.

        Args:
            x: (B, ...).
            padding: What image guidance shows its pass 1 in place of ``x``.

        Returns:
            (P*B, ...).
        """
        if self.num_passes == 1:
            return x
        passes = [x] * self.num_passes
        if self.image_guidance_scale and padding is not None:
            passes[1] = padding.expand_as(x)
        return torch.cat(passes)

    def expand_text(self, c: Tensor) -> Tensor:
        """Conditions of all passes from [text || null], (2B, L, D): (P*B, L, D)."""
        if not self.extra_pass:
            return c
        text, null = c.chunk(2)
        third = null if self.image_guidance_scale else text
        return torch.cat([text, null, third])

    def scale(self, x: Tensor, scale: float | None = None) -> Tensor:
        """Combine the predictions of all passes.

        Args:
            x: (P*B, ...).
            scale: Weight of the prompt; ``guidance_scale`` when None.

        Returns:
            (B, ...).
        """
        if self.num_passes == 1:
            return x
        g = self.guidance_scale if scale is None else scale
        if self.image_guidance_scale:
            cond, uncond, image = x.chunk(3)
            guided = self.renorm(uncond + g * (cond - image), cond)
            return guided + self.image_guidance_scale * (image - uncond)
        if self.spatiotemporal_guidance_scale:
            cond, uncond, perturbed = x.chunk(3)
            guided = self.renorm(uncond + g * (cond - uncond), cond)
            return guided + self.spatiotemporal_guidance_scale * (cond - perturbed)
        cond, uncond = x.chunk(2)
        return self.renorm(torch.lerp(uncond, cond, g), cond)

    def renorm(self, x: Tensor, cond: Tensor) -> Tensor:
        """Bring the norm of ``x`` down towards that of ``cond``, sample by sample."""
        if self.guidance_renorm >= 1:
            return x
        dims = tuple(range(1, x.ndim))
        norms = [torch.linalg.vector_norm(y, dim=dims, keepdim=True) for y in (cond, x)]
        return x * (norms[0] / norms[1]).clamp(self.guidance_renorm, 1.0)
