"""Embeddings: positions, patches, text, labels, motion and the masked-token vectors.

Shapes: B batch, C latent channels, T frames, h w latent size, p patch size, N tokens of one
frame, L any token count, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.text_encoders.encoding import encode_texts

__all__ = [
    "LabelEmbed",
    "MaskEmbed",
    "MotionEmbed",
    "PatchEmbed",
    "PosEmbed",
    "RotaryEmbed3D",
    "Rotation",
    "RotationTables",
    "TextEmbed",
    "TrainingMask",
    "VideoPosEmbed",
    "frequencies",
    "gather_tokens",
    "scatter_tokens",
    "sincos",
    "timestep_features",
]

MAX_PERIOD = 10000.0


def frequencies(num: int, device: torch.device | None = None) -> Tensor:
    """Geometric frequencies 10000^(-k/num), k < num, float32 (arXiv:1706.03762)."""
    steps = torch.arange(num, dtype=torch.float32, device=device)
    return torch.pow(MAX_PERIOD, -steps / num)


def sincos(values: Tensor, num: int) -> Tensor:
    """[sin(v f) || cos(v f)] of each value, (..., 2 num), float32."""
    angles = values.float().unsqueeze(-1) * frequencies(num, values.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=32)
def _sincos_grid(h: int, w: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table of `PosEmbed`, (h*w, dim), one for each size, device and dtype.

    Built outside inference mode, so that a table first made while sampling can be trained with.
    """
    with torch.inference_mode(False), torch.no_grad():
        y = torch.arange(h, dtype=torch.float32, device=device)
        x = torch.arange(w, dtype=torch.float32, device=device)
        columns = sincos(x, dim // 4).expand(h, w, -1)
        rows = sincos(y, dim // 4).unsqueeze(1).expand(h, w, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1).to(dtype)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``x`` (B, L, D) at token ``ids`` (B, n, 1): (B, n, D)."""
    return x.gather(1, ids.expand(-1, -1, x.size(-1)))


def scatter_tokens(x: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``x`` (B, L, D) whose rows at ``ids`` (B, n, 1) are ``rows`` (B, n, D)."""
    return x.scatter(1, ids.expand(-1, -1, x.size(-1)), rows)


@dataclass(frozen=True)
class Rotation:
    """A rotary position encoding, ready to turn queries and keys.

    Attributes:
        cos: Cosines of the angles, (B or 1, 1, L, head_dim/2), float32.
        sin: Sines, same shape.
    """

    cos: Tensor
    sin: Tensor

    @property
    def weight(self) -> Tensor:
        """Rotation matrices [[cos, -sin], [sin, cos]], (B or 1, 1, L, head_dim/2, 2, 2)."""
        rows = [self.cos, -self.sin, self.sin, self.cos]
        return torch.stack(rows, dim=-1).unflatten(-1, (2, 2))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate interleaved pairs of ``x`` (..., H, L, head_dim) by each token's angles."""
        return self.tables(x.dtype)(x)

    def tables(self, dtype: torch.dtype) -> RotationTables:
        """What turns many tensors of a dtype."""
        cos = self.cos.repeat_interleave(2, dim=-1)
        sin = torch.stack([-self.sin, self.sin], dim=-1).flatten(-2)
        return RotationTables(cos.to(dtype), sin.to(dtype))


@dataclass(frozen=True)
class RotationTables:
    """Factors of a :class:`Rotation` for every channel.

    Attributes:
        cos: Of a channel itself, (B or 1, 1, L, head_dim).
        sin: Of the other channel of its pair, with its sign, same shape.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate interleaved pairs of ``x`` (..., H, L, head_dim)."""
        others = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x * self.cos.to(x.dtype), others, self.sin.to(x.dtype))

    def select(self, ids: Tensor, pad: int = 0) -> RotationTables:
        """The factors of the first ``pad`` tokens and of those at ``ids`` behind them.

        Args:
            ids: (B, k, 1), counted from the end of the padding.
            pad: Number of condition tokens in front.
        """
        ids = F.pad(ids.squeeze(-1) + pad, (pad, 0))  # (B, pad + k)
        ids[:, :pad] = torch.arange(pad, device=ids.device)
        index = ids[:, None, :, None].expand(-1, 1, -1, self.cos.size(-1))
        tables = (table.expand(len(ids), -1, -1, -1) for table in (self.cos, self.sin))
        return RotationTables(*(table.gather(2, index) for table in tables))


class RotaryEmbed3D(nn.Identity):
    """Rotary positions over time, height and width (RoFormer, arXiv:2104.09864).

    An eighth of the head width turns with time, the rest in halves with height and width.

    Args:
        dim: Head width; ``dim // 8`` and ``(dim - dim // 8) // 2`` must be even and fill it.
        base_size: Default (height, width) of the token grid.
        theta: Longest period.
    """

    def __init__(
        self, dim: int = 64, base_size: Sequence[int] = (16, 16), theta: float = 10000.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base_size = tuple(base_size)
        self.theta = theta
        for name, exponents in zip(self._scale_names, self._exponents(None), strict=True):
            self.register_buffer(name, exponents, persistent=False)

    _scale_names = ("scale0", "scale1", "scale2")

    def _exponents(self, device: torch.device | None) -> list[Tensor]:
        """Exponents of theta for time, height and width, each (axis width / 2,) float32."""
        time = self.dim // 8
        space = (self.dim - time) // 2
        return [
            torch.arange(0, width, 2, dtype=torch.float32, device=device) / max(width, 1)
            for width in (time, space, space)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbed3D:
        """Move with the model but stay float32: rounded exponents would bend every angle."""
        super()._apply(fn, recurse)
        for name, exponents in zip(
            self._scale_names, self._exponents(self.scale0.device), strict=True
        ):
            self.register_buffer(name, exponents, persistent=False)
        return self

    def get_pos(self, t: int = 1, bs: int = 1, hw: Sequence[int] | None = None) -> Tensor:
        """Integer positions (t, y, x) of every token, row by row, frame by frame.

        Args:
            t: Number of frames.
            bs: Batch size; the batch is an expanded view of one table.
            hw: Grid size; ``base_size`` when None.

        Returns:
            (bs, t*h*w, 3), float32.
        """
        h, w = hw or self.base_size
        axes = [torch.arange(n, dtype=torch.float32, device=self.scale0.device) for n in (t, h, w)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return grid.flatten(0, 2).unsqueeze(0).expand(bs, -1, -1)

    def get_func(self, pos: Tensor, pad: int = 0, ids: Tensor | None = None) -> Rotation:
        """The rotation of tokens at ``pos``.

        Args:
            pos: Positions, (B or 1, L, 3).
            pad: Tokens at position zero to put in front (text and other conditions).
            ids: Tokens to keep, (B, k, 3) indices into L; all when None.

        Raises:
            ValueError: If the head width cannot be split over three axes.
        """
        if 2 * sum(len(scale) for scale in self._scales()) != self.dim:
            raise ValueError(
                f"a head width of {self.dim} cannot be split in time, height and width: "
                "dim // 8 and (dim - dim // 8) / 2 must be even numbers"
            )
        if ids is not None:
            pos = pos.expand(ids.size(0), -1, -1).gather(1, ids)
        if pad:
            pos = F.pad(pos, (0, 0, pad, 0))
        angles = [
            axis.unsqueeze(-1) / torch.pow(self.theta, scale)
            for axis, scale in zip(pos.float().unbind(-1), self._scales(), strict=True)
        ]
        angle = torch.cat(angles, dim=-1).unsqueeze(1)  # (B, 1, L, dim/2)
        return Rotation(cos=angle.cos(), sin=angle.sin())

    def _scales(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.scale0, self.scale1, self.scale2


class PosEmbed(nn.Module):
    """Fixed sine-cosine table over a token grid, width before height.

    Args:
        dim: Token width, a multiple of four.
        base_size: (height, width) of the grid; other grids are an error.
    """

    def __init__(self, dim: int, base_size: Sequence[int] = (16, 16)) -> None:
        super().__init__()
        self.dim = dim
        self.base_h, self.base_w = base_size

    def get_space_embed(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The table, (base_h*base_w, dim): [sin x, cos x, sin y, cos y] of each token."""
        device = torch.device(device or "cpu")
        return _sincos_grid(self.base_h, self.base_w, self.dim, device, dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Add the table to tokens (..., N, dim).

        Raises:
            ValueError: If N is not the number of tokens of the grid.
        """
        if x.size(-2) != self.base_h * self.base_w:
            raise ValueError(
                f"the position table holds {self.base_h}x{self.base_w} tokens, got {x.size(-2)}: "
                "the latent size must be the one the model was built for"
            )
        return x + self.get_space_embed(x.device, x.dtype)


def _value_mlp(dim: int, freq_dim: int = 256) -> nn.Sequential:
    """Projection of a sine-cosine feature to the model width."""
    return nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class VideoPosEmbed(PosEmbed):
    """Learned time embedding on top of the fixed spatial table.

    Args:
        dim: Token width.
        base_size: (frames, height, width); time is measured in units of this length.
    """

    def __init__(self, dim: int, base_size: Sequence[int]) -> None:
        super().__init__(dim, base_size[1:])
        self.base_t = base_size[0]
        self.norm = nn.LayerNorm(dim)
        self.time_proj = _value_mlp(dim)

    def get_time_embed(self, t: int, device: torch.device | None = None) -> Tensor:
        """Embedding of each of ``t`` frames, rescaled to the base length: (t, 1, dim)."""
        weight = self.time_proj[0].weight
        device = weight.device if device is None else device  # offloaded weights have none
        steps = torch.arange(t, dtype=torch.float32, device=device)
        features = sincos(steps * (self.base_t / t), 128).to(weight.dtype)
        return self.norm(self.time_proj(features)).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Add time and space to videos (B, T, N, dim); space alone to frames (B, N, dim)."""
        if x.ndim == 4:
            x = x + self.get_time_embed(x.size(1), x.device)
        return super().forward(x)


class MotionEmbed(nn.Module):
    """Motion strength and frame rate as two condition tokens.

    Args:
        dim: Token width.
        base_flow: Motion strength assumed when none is given.
        base_fps: Frames per second assumed when none are given.
    """

    def __init__(self, dim: int, base_flow: float = 5, base_fps: float = 12) -> None:
        super().__init__()
        self.base_flow = base_flow
        self.base_fps = base_fps
        self.flow_proj = _value_mlp(dim)
        self.fps_proj = _value_mlp(dim)

    def forward(
        self,
        c: Tensor,
        flow: Sequence[float] | float | None = None,
        fps: Sequence[float] | float | None = None,
    ) -> Tensor:
        """Embed motion.

        Args:
            c: Any condition (B, L, dim); gives batch size, dtype and device.
            flow: Motion strength of each sample.
            fps: Frames per second of each sample.

        Returns:
            (B, 2, dim): the flow token, then the frame-rate token.
        """
        flow = [self.base_flow] * c.size(0) if flow is None else flow
        fps = [self.base_fps] * c.size(0) if fps is None else fps
        tokens = [self.flow_proj(self._features(c, flow)), self.fps_proj(self._features(c, fps))]
        return torch.cat(tokens, dim=1)

    @staticmethod
    def _features(c: Tensor, values: Sequence[float] | float) -> Tensor:
        rows = torch.as_tensor(values, dtype=torch.float32, device=c.device).reshape(-1, 1)
        return sincos(rows, 128).to(c.dtype)  # (B, 1, 256)


class PatchProjection(nn.Conv2d):
    """Projects patches: those of pictures by convolution, patches cut before as vectors."""

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, C, h, w) to (B, D, h/p, w/p), or patches (..., p*p*C) to (..., D)."""
        if x.ndim == 4:
            return super().forward(x)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Latent patches to tokens.

    Args:
        image_dim: Latent channels C.
        embed_dim: Token width D.
        patch_size: Patch side p.

    Attributes:
        hw: Token grid of the last picture seen; (None, None) before the first.
    """

    def __init__(self, image_dim: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.image_dim = image_dim
        self.patch_size = patch_size
        self.hw: tuple[int | None, int | None] = (None, None)
        self.proj = PatchProjection(image_dim, embed_dim, patch_size, stride=patch_size)

    @property
    def height(self) -> int | None:
        """Rows of ``hw``."""
        return self.hw[0]

    @property
    def width(self) -> int | None:
        """Columns of ``hw``."""
        return self.hw[1]

    def forward(self, x: Tensor) -> Tensor:
        """Embed latents.

        Args:
            x: (B, C, h, w), or a video (B, C, T, h, w), or tokens, which pass unchanged.

        Returns:
            (B, N, D), for a video (B, T, N, D); tokens row by row.
        """
        if x.ndim == 3:
            return x
        self.hw = self.grid(x)
        if x.ndim == 5:
            frames = x.transpose(1, 2)  # (B, T, C, h, w)
            return self.proj(frames.flatten(0, 1)).flatten(2).mT.unflatten(0, frames.shape[:2])
        return self.proj(x).flatten(2).mT

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Token grid (rows, columns) of latents (..., h, w)."""
        return x.size(-2) // self.patch_size, x.size(-1) // self.patch_size

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Embed patches (B, n, p*p*C) as :meth:`forward` embeds the picture they were cut from."""
        return self.proj(patches)

    def patchify(self, x: Tensor) -> Tensor:
        """Cut (B, C, h, w) into patches (B, N, p*p*C), channels innermost."""
        rows, columns = self.grid(x)
        p = self.patch_size
        x = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, rows, p, columns, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        """Inverse of :meth:`patchify`.

        Args:
            x: Patches, (B, N, p*p*C).
            hw: Token grid; that of the last picture seen when None.

        Returns:
            (B, C, h, w).
        """
        rows, columns = hw or self.hw
        p = self.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class TextEmbed(nn.Module):
    """Text states to condition tokens, with a learned vector at every unused position.

    Args:
        token_dim: Width of the text encoder's states.
        embed_dim: Width of the condition tokens.
        num_tokens: Length every prompt is brought to.
        dropout: Share of training prompts replaced by the null prompt (classifier-free guidance,
            arXiv:2207.12598).

    Attributes:
        encoders: ``[tokenizer, text_encoder]`` for prompts given as strings, else empty. Not
            sub-modules: they are frozen and saved elsewhere.
    """

    def __init__(
        self, token_dim: int, embed_dim: int, num_tokens: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.num_tokens = num_tokens
        self.dropout = dropout
        self.encoders: list[Any] = []
        self.proj = nn.Linear(token_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        # A buffer, not a parameter: it was never trained, but checkpoints hold it.
        self.register_buffer("weight", torch.empty(512, token_dim).normal_(std=0.02))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[Any]) -> Tensor:
        """Raw text states of each prompt on top of the null prompt.

        In training, one NumPy draw per prompt decides whether it is dropped.

        Args:
            prompts: All strings, or all states, arrays or tensors (k, token_dim) with
                k <= num_tokens.

        Returns:
            (len(prompts), num_tokens, token_dim), dtype and device of this module.

        Raises:
            TypeError: If strings and states are mixed.
            ValueError: If there are no prompts, states do not fit, or a string is given and no
                text encoder is attached.
        """
        if len(prompts) == 0:
            raise ValueError("at least one prompt is needed, got none")
        is_text = [isinstance(prompt, str) for prompt in prompts]
        if any(is_text) and not all(is_text):
            kinds = sorted({type(prompt).__name__ for prompt in prompts})
            raise TypeError(f"prompts must be all strings or all text states, got {kinds}")
        states = self._encode_text(prompts) if is_text[0] else self._as_states(prompts)
        output = self.weight[: self.num_tokens].repeat(len(states), 1, 1)
        for row, state in zip(output, states, strict=True):
            if self.training and self.dropout > 0 and np.random.rand() < self.dropout:
                continue
            row[: len(state)] = state.to(row)
        return output

    def _as_states(self, prompts: Sequence[Any]) -> list[Tensor]:
        states = [torch.as_tensor(prompt) for prompt in prompts]
        for index, state in enumerate(states):
            if state.ndim != 2 or state.size(1) != self.token_dim or len(state) > self.num_tokens:
                raise ValueError(
                    f"text states must be (k, {self.token_dim}) with k <= {self.num_tokens}, "
                    f"got {tuple(state.shape)} for prompt {index}"
                )
        return states

    def _encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """States of the real tokens of each string; different ones are encoded in one batch."""
        if len(self.encoders) != 2 or any(encoder is None for encoder in self.encoders):
            raise ValueError(
                "prompts given as text need a tokenizer and a text encoder, and none is attached: "
                "load the pipeline with both, or pass prompt embeddings"
            )
        tokenizer, text_encoder = self.encoders
        device = text_encoder.device
        if device.type == "meta":  # offloaded: its hooks bring inputs to where it runs
            device = self.weight.device
        return encode_texts(
            tokenizer, text_encoder, prompts, self.num_tokens, self.token_dim, device
        )

    def forward(self, x: Tensor | Sequence[Any]) -> Tensor:
        """Condition tokens (B, num_tokens, embed_dim) of text states or of a list of prompts."""
        if isinstance(x, (tuple, list)):
            x = self.encode_prompts(x)
        return self.norm(self.proj(x))


class LabelEmbed(nn.Module):
    """Class labels to one condition token.

    Args:
        embed_dim: Token width.
        num_classes: Number of classes; the next index is the null class.
        dropout: Share of training labels replaced by the null class; without dropout there is
            no null class.
    """

    def __init__(self, embed_dim: int, num_classes: int = 1000, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        rows = num_classes + 1 if dropout > 0 else num_classes
        self.weight = nn.Parameter(torch.empty(rows, embed_dim).normal_(std=0.02))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed labels (B,) or (B, 1) as (B, 1, embed_dim)."""
        ids = ids.unsqueeze(-1) if ids.ndim == 1 else ids
        if self.training and self.dropout > 0:
            kept = torch.rand(ids.shape, device=ids.device) > self.dropout
            ids = torch.where(kept, ids, self.num_classes)
        return self.norm(self.weight[ids])


@dataclass(frozen=True)
class TrainingMask:
    """Which tokens of each frame are hidden in one training step.

    Attributes:
        hidden: 1 where the token is to be predicted, (B, N, 1), in the dtype of the tokens.
        hidden_ids: The tokens to be predicted, (B, n, 1); one n for the batch.
        known_ids: The visible tokens, (B, N - n, 1).
    """

    hidden: Tensor
    hidden_ids: Tensor
    known_ids: Tensor


class MaskEmbed(nn.Module):
    """The vectors in place of hidden tokens and of the frame before the first.

    Args:
        embed_dim: Token width.
        mask_ratios: Smallest and largest share of hidden tokens in training; a third number is
            the standard deviation of the truncated normal around the largest.
    """

    def __init__(self, embed_dim: int, mask_ratios: Sequence[float] = (0.7, 1.0)) -> None:
        super().__init__()
        self.mask_ratios = list(mask_ratios) + [0.25] * (len(mask_ratios) == 2)
        self.bos_token = nn.Parameter(torch.empty(1, embed_dim).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim).normal_(std=0.02))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The vector of the frame before the first, and that of hidden tokens; (1, D) each.

        A call, unlike reading the parameters, also works on offloaded weights.
        """
        return self.bos_token, self.mask_token

    def apply_mask(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Put the mask vector in place of hidden tokens.

        Args:
            x: Tokens, (B, N, D).
            hidden: 1 = hidden, (B, N, 1).
        """
        return x * (1 - hidden) + self.mask_token * hidden

    def draw_mask(self, x: Tensor) -> TrainingMask:
        """Hide a random share of the tokens of ``x`` (B, N, D).

        Draws one torch uniform per token, then one NumPy uniform for the share.

        Source: masked autoregressive training, MAR, arXiv:2406.11838.
        """
        batch, num_tokens = x.shape[:2]
        scores = torch.rand(batch, num_tokens, 1, device=x.device)
        num_known = round((1 - self._draw_ratio()) * num_tokens)
        order = scores.argsort(dim=1, stable=True)
        known_ids, hidden_ids = order[:, :num_known], order[:, num_known:]
        hidden = x.new_ones(batch, num_tokens, 1).scatter_(1, known_ids, 0)
        return TrainingMask(hidden=hidden, hidden_ids=hidden_ids, known_ids=known_ids)

    def _draw_ratio(self) -> float:
        """One draw of a normal with mean 1, truncated to the mask ratios, by inversion."""
        low, high, std = self.mask_ratios
        normal = NormalDist()
        low_mass = normal.cdf((low - 1) / std)
        high_mass = normal.cdf((high - 1) / std)
        quantile = low_mass + np.random.uniform() * (high_mass - low_mass)
        return 1 + std * normal.inv_cdf(quantile)


def timestep_features(t: Tensor, freq_dim: int, dtype: torch.dtype) -> Tensor:
    """[cos(t f) || sin(t f)] of diffusion timesteps (arXiv:2006.11239): (..., freq_dim)."""
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (
        -math.log(MAX_PERIOD) / half
    )
    angles = t.float().unsqueeze(-1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
