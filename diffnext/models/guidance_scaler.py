"""Classifier-free guidance over two or three passes (arXiv:2207.12598).

Shapes: B batch, P passes; guided batches are pass-major: pass 0 of all samples, then pass 1, ...
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffnext.utils.arguments import CHECKED, AtLeastOne, AtLeastZero, Listed

__all__ = ["GuidanceScaler"]


@dataclass(frozen=True, config=CHECKED)
class GuidanceScaler:
    """Weights of the guided passes; other keyword arguments are ignored.

    With guidance, pass 0 is conditional and pass 1 unconditional. A third pass is either the
    prompt-free prediction with earlier frames seen (image guidance) or a perturbed conditional one
    (spatiotemporal guidance). NOVA perturbs no block, so the spatiotemporal pass equals the
    conditional one and changes nothing; it is accepted and costs half as much again.

    Without guidance (a ``guidance_scale`` of 1 or less) there is one pass and the other weights
    have no effect.

    Attributes:
        guidance_scale: Weight of the prompt; above 1 guidance is on.
        guidance_trunc: Diffusion timestep below which guidance is off; 0 = never.
        guidance_renorm: Below 1, guidance may not lengthen predictions: their norm is brought
            down towards the unguided one, at most by this factor.
        image_guidance_scale: Weight of earlier frames against none; 0 = off.
        spatiotemporal_guidance_scale: Weight of the perturbed pass; 0 = off.
        min_guidance_scale: Weight of the prompt at the start of each frame, growing to
            ``guidance_scale`` over its sets; None = constant.
        guidance_interval: Least and greatest diffusion timestep at which guidance is on, an
            approximation that saves the other passes elsewhere; None = all (arXiv:2404.07724).
        guidance_reuse: Sets of tokens that share the image encoder's states of all passes but the
            conditional one, an approximation; 1 = off (the condition cache of LazyMAR,
            arXiv:2503.12450).

    Raises:
        ValueError: Naming the argument that is out of range, or the two that exclude each other.
    """

    guidance_scale: AtLeastZero = 1
    guidance_trunc: AtLeastZero = 0
    guidance_renorm: AtLeastZero = 1
    image_guidance_scale: AtLeastZero = 0
    spatiotemporal_guidance_scale: AtLeastZero = 0
    min_guidance_scale: AtLeastZero | None = None
    guidance_interval: Annotated[tuple[AtLeastZero, AtLeastZero], Listed] | None = None
    guidance_reuse: AtLeastOne = 1

    @model_validator(mode="after")
    def _check_pairs(self) -> GuidanceScaler:
        interval = self.guidance_interval
        if interval is not None and interval[0] > interval[1]:
            raise ValueError(
                f"guidance_interval must be the least and the greatest timestep, got {interval}"
            )
        if self.image_guidance_scale and self.spatiotemporal_guidance_scale:
            raise ValueError(
                "image_guidance_scale and spatiotemporal_guidance_scale cannot be combined, got "
                f"{self.image_guidance_scale} and {self.spatiotemporal_guidance_scale}"
            )
        return self

    @property
    def num_passes(self) -> int:
        """Passes P; they follow from the full scale, so a growing weight keeps the same batch."""
        if self.guidance_scale <= 1:
            return 1
        return 3 if self.image_guidance_scale or self.spatiotemporal_guidance_scale else 2

    def scale_at(self, progress: float) -> float:
        """Weight of the prompt once ``progress`` (0 to 1) of the frame's sets are done."""
        start = self.guidance_scale if self.min_guidance_scale is None else self.min_guidance_scale
        return start + (self.guidance_scale - start) * progress

    def is_off(self, timestep: float) -> bool:
        """Whether guidance is on in general and off at this diffusion timestep."""
        if self.num_passes == 1:
            return False
        low, high = self.guidance_interval or (timestep, timestep)
        return timestep < self.guidance_trunc or not low <= timestep <= high

    def expand(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Repeat a batch for every pass.

        Args:
            x: (B, ...).
            padding: What image guidance shows its pass 1 instead of ``x``.

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
        if self.num_passes < 3:
            return c
        text, null = c.chunk(2)
        return torch.cat([text, null, null if self.image_guidance_scale else text])

    def scale(self, x: Tensor, scale: float | Tensor | None = None) -> Tensor:
        """Combine the predictions of all passes.

        Args:
            x: (P*B, ...).
            scale: Weight of the prompt; ``guidance_scale`` when None. Given as a tensor, float32
                without dimensions, it is used without rounding to the dtype of ``x``.

        Returns:
            (B, ...).
        """
        if self.num_passes == 1:
            return x
        if isinstance(scale, Tensor) and x.dtype != scale.dtype:
            return self.scale(x.to(scale.dtype), scale).to(x.dtype)
        g = self.guidance_scale if scale is None else scale
        if self.num_passes == 2:
            cond, uncond = x.chunk(2)
            return self.renorm(torch.lerp(uncond, cond, g), cond)
        cond, uncond, third = x.chunk(3)
        if self.image_guidance_scale:
            guided = self.renorm(uncond + g * (cond - third), cond)
            return guided + self.image_guidance_scale * (third - uncond)
        guided = self.renorm(uncond + g * (cond - uncond), cond)
        return guided + self.spatiotemporal_guidance_scale * (cond - third)

    def renorm(self, x: Tensor, cond: Tensor) -> Tensor:
        """Bring the norm of ``x`` down towards the norm of ``cond``, sample by sample."""
        if self.guidance_renorm >= 1:
            return x
        dims = tuple(range(1, x.ndim))
        norms = [torch.linalg.vector_norm(y, dim=dims, keepdim=True) for y in (cond, x)]
        return x * (norms[0] / norms[1]).clamp(self.guidance_renorm, 1.0)
