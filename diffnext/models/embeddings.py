"""Embeddings: positions, patches, text, labels, motion and the masked-token vectors.

Shapes: B batch, C latent channels, T frames, h w latent size, p patch size, N tokens of one
frame, L any token count, D width, H heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffnext.models.text_encoders.encoding import encode_texts
from diffnext.utils.host_data import send

__all__ = [
    "LabelEmbed",
    "MaskEmbed",
    "MotionEmbed",
    "PatchEmbed",
    "PosEmbed",
    "RotaryEmbed3D",
    "RotationTables",
    "TextEmbed",
    "TrainingMask",
    "VideoPosEmbed",
    "gather_tokens",
    "scatter_tokens",
    "sincos",
    "timestep_features",
]

MAX_PERIOD = 10000.0
NULL_TOKENS = 512  # of the null prompt, in every checkpoint
PositionFunction = Callable[[Tensor], Tensor]  # turns queries or keys (B, H, L, d) by position


def sincos(values: Tensor, num: int) -> Tensor:
    """[sin(v f) || cos(v f)] of each value, f = 10000^(-k/num), k < num (arXiv:1706.03762).

    Returns:
        (..., 2 num), float32.
    """
    steps = torch.arange(num, dtype=torch.float32, device=values.device)
    angles = values.float().unsqueeze(-1) * torch.pow(MAX_PERIOD, -steps / num)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``x`` (B, L, D) at token ``ids`` (B, n, 1): (B, n, D)."""
    return x.gather(1, ids.expand(-1, -1, x.size(-1)))


def scatter_tokens(x: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``x`` (B, L, D) whose rows at ``ids`` (B, n, 1) are ``rows`` (B, n, D)."""
    return x.scatter(1, ids.expand(-1, -1, x.size(-1)), rows)


@dataclass(frozen=True)
class RotationTables:
    """A rotary position encoding, ready to turn queries and keys.

    Attributes:
        cos: Factors of each channel itself, (B or 1, 1, L, head_dim).
        sin: Factors of the other channel of its pair, with their sign, same shape.
    """

    cos: Tensor
    sin: Tensor

    @property
    def weight(self) -> Tensor:
        """Rotation matrices [[cos, -sin], [sin, cos]], (B or 1, 1, L, head_dim/2, 2, 2)."""
        first, second = slice(0, None, 2), slice(1, None, 2)
        rows = [self.cos[..., first], self.sin[..., first], self.sin[..., second]]
        return torch.stack([*rows, self.cos[..., second]], dim=-1).unflatten(-1, (2, 2))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate interleaved pairs of ``x`` (..., H, L, head_dim) by each token's angles."""
        others = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x * self.cos.to(x.dtype), others, self.sin.to(x.dtype))

    def to(self, dtype: torch.dtype) -> RotationTables:
        """The same factors in another dtype: cast once for many tensors."""
        return RotationTables(self.cos.to(dtype), self.sin.to(dtype))

    def pad(self, num_tokens: int) -> RotationTables:
        """The same factors, followed by zeros for ``num_tokens`` tokens of padding."""
        return RotationTables(
            *(F.pad(table, (0, 0, 0, num_tokens)) for table in (self.cos, self.sin))
        )

    def select(self, ids: Tensor, pad: int = 0) -> RotationTables:
        """The factors of the first ``pad`` tokens, followed by the tokens at ``ids``.

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

    scale0: Tensor
    scale1: Tensor
    scale2: Tensor

    def __init__(
        self, dim: int = 64, base_size: Sequence[int] = (16, 16), theta: float = 10000.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base_size = tuple(base_size)
        self.theta = theta
        self._set_scales()

    def _set_scales(self, device: torch.device | None = None) -> None:
        """Exponents of theta for time, height and width, each (axis width / 2,) float32."""
        time = self.dim // 8
        space = (self.dim - time) // 2
        for name, width in (("scale0", time), ("scale1", space), ("scale2", space)):
            steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
            self.register_buffer(name, steps / max(width, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbed3D:
        """Move with the model but stay float32: rounded exponents would bend every angle."""
        super()._apply(fn, recurse)
        self._set_scales(self.scale0.device)
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

    def get_func(self, pos: Tensor, pad: int = 0, ids: Tensor | None = None) -> RotationTables:
        """The rotation of tokens at ``pos``.

        Args:
            pos: Positions, (B or 1, L, 3).
            pad: Tokens at position zero to put in front (text and other conditions).
            ids: Tokens to keep, indices into L, (B, k, 1) or repeated for each axis, (B, k, 3);
                all when None.

        Raises:
            ValueError: If the head width cannot be split over three axes.
        """
        scales = (self.scale0, self.scale1, self.scale2)
        if 2 * sum(len(scale) for scale in scales) != self.dim:
            raise ValueError(
                f"a head width of {self.dim} cannot be split in time, height and width: "
                "dim // 8 and (dim - dim // 8) / 2 must be even numbers"
            )
        pos = F.pad(pos.float(), (0, 0, pad, 0))
        angles = [
            axis.unsqueeze(-1) / torch.pow(self.theta, scale)
            for axis, scale in zip(pos.unbind(-1), scales, strict=True)
        ]
        angle = torch.cat(angles, dim=-1).unsqueeze(1)  # (B, 1, L, dim/2)
        sin = angle.sin()
        tables = RotationTables(
            cos=angle.cos().repeat_interleave(2, dim=-1),
            sin=torch.stack([-sin, sin], dim=-1).flatten(-2),
        )
        return tables if ids is None else tables.select(ids[..., :1], pad)


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
        h, w = self.base_h, self.base_w
        steps = torch.arange(max(h, w), dtype=torch.float32, device=device)
        axis = sincos(steps, self.dim // 4)  # (max(h, w), dim/2), the same for both axes
        columns = axis[:w].expand(h, -1, -1)
        rows = axis[:h].unsqueeze(1).expand(-1, w, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1).to(dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Add the table to tokens (..., N, dim); raises as :meth:`table_for`."""
        return x + self.table_for(x)

    def table_for(self, x: Tensor) -> Tensor:
        """What is added to tokens (..., N, dim): (N, dim).

        Raises:
            ValueError: If N is not the number of tokens of the grid.
        """
        if x.size(-2) != self.base_h * self.base_w:
            raise ValueError(
                f"the position table holds {self.base_h}x{self.base_w} tokens, got {x.size(-2)}: "
                "the latent size must be the one the model was built for"
            )
        return self.get_space_embed(x.device, x.dtype)


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
        weight = self.norm.weight
        device = weight.device if device is None else device  # offloaded weights have none
        steps = torch.arange(t, dtype=torch.float32, device=device)
        features = sincos(steps * (self.base_t / t), 128).to(weight.dtype)
        return self.norm(self.time_proj(features)).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Add time and space to videos (B, T, N, dim); only space to frames (B, N, dim)."""
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
        rows = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1)
        return sincos(send(rows, c.device), 128).to(c.dtype)  # (B, 1, 256)


class PatchMatrix(NamedTuple):
    """Projects patches that are cut already.

    Attributes:
        weight: (D, p*p*C), a rearranged copy of a convolution's.
        bias: (D,).
    """

    weight: Tensor
    bias: Tensor | None


class PatchProjection(nn.Conv2d):
    """Projects patches of pictures by convolution, or patches that are cut already as vectors."""

    def forward(self, x: Tensor | None) -> Any:
        """Pictures (B, C, h, w) to (B, D, h/p, w/p); for None, the :class:`PatchMatrix`."""
        if x is not None:
            return super().forward(x)
        return PatchMatrix(self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Latent patches to tokens.

    Args:
        image_dim: Latent channels C.
        embed_dim: Token width D.
        patch_size: Patch side p.

    Attributes:
        height: Rows of tokens of the last picture seen; None before the first.
        width: Its columns.
    """

    def __init__(self, image_dim: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.image_dim = image_dim
        self.patch_size = patch_size
        self.height: int | None = None
        self.width: int | None = None
        self.proj = PatchProjection(image_dim, embed_dim, patch_size, stride=patch_size)

    @property
    def hw(self) -> tuple[Any, Any]:
        """Rows and columns of the last picture seen; (None, None) before the first."""
        return self.height, self.width

    def forward(self, x: Tensor) -> Tensor:
        """Embed latents.

        Args:
            x: (B, C, h, w), or a video (B, C, T, h, w), or tokens, which pass unchanged.

        Returns:
            (B, N, D), for a video (B, T, N, D); tokens row by row.
        """
        if x.ndim == 3:
            return x
        self.height, self.width = self.grid(x.shape)
        if x.ndim == 5:
            frames = x.transpose(1, 2)  # (B, T, C, h, w)
            return self.proj(frames.flatten(0, 1)).flatten(2).mT.unflatten(0, frames.shape[:2])
        return self.proj(x).flatten(2).mT

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Token grid (rows, columns) of latents of the shape (..., h, w)."""
        return shape[-2] // self.patch_size, shape[-1] // self.patch_size

    def matrix(self) -> PatchMatrix:
        """What projects patches, for many calls of :meth:`embed_patches`."""
        return self.proj(None)

    def embed_patches(self, patches: Tensor, matrix: PatchMatrix | None = None) -> Tensor:
        """Embed patches (..., p*p*C) as :meth:`forward` embeds the picture they were cut from."""
        return F.linear(patches, *(self.matrix() if matrix is None else matrix))

    def patchify(self, x: Tensor) -> Tensor:
        """Cut (B, C, h, w) into patches (B, N, p*p*C), channels innermost."""
        rows, columns = self.grid(x.shape)
        p = self.patch_size
        x = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, rows, p, columns, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        """Inverse of :meth:`patchify`.

        Args:
            x: Patches, (B, N, p*p*C).
            hw: Token grid; when None, of the last picture seen.

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

    Raises:
        ValueError: If ``num_tokens`` is out of range: the null prompt has ``NULL_TOKENS`` vectors.

    Attributes:
        encoders: ``[tokenizer, text_encoder]`` for callers that give this module prompts as
            strings, else empty. Not sub-modules: they are frozen and saved elsewhere, and a copy
            of this module shares them.
    """

    weight: Tensor

    def __init__(
        self, token_dim: int, embed_dim: int, num_tokens: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if not isinstance(num_tokens, int) or not 1 <= num_tokens <= NULL_TOKENS:
            raise ValueError(f"num_tokens must be 1 to {NULL_TOKENS}, got {num_tokens!r}")
        self.token_dim = token_dim
        self.num_tokens = num_tokens
        self.dropout = dropout
        self.encoders: list[Any] = []
        self.proj = nn.Linear(token_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        # A buffer, not a parameter: it was never trained, but checkpoints hold it.
        self.register_buffer("weight", torch.zeros(NULL_TOKENS, token_dim))
        nn.init.normal_(self.weight, std=0.02)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEmbed:
        result = memo[id(self)] = type(self).__new__(type(self))
        memo.setdefault(id(self.encoders), list(self.encoders))
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    @torch.no_grad()
    def pad_states(self, states: Sequence[Any]) -> Tensor:
        """Bring text states to one length, with the end of the null prompt after each prompt.

        Args:
            states: An array or tensor of floats for each prompt, (k, token_dim) with
                k <= num_tokens.

        Returns:
            (len(states), num_tokens, token_dim), dtype and device of this module.

        Raises:
            TypeError: If states are not floating-point arrays or tensors.
            ValueError: If there are none, they do not fit, or hold NaN or infinity (seen only
                on the CPU: on a GPU the check would wait for it).
        """
        if len(states) == 0:
            raise ValueError("at least one prompt is needed, got none")
        tensors = [self.check_state(state, index) for index, state in enumerate(states)]
        output = self.weight[: self.num_tokens].repeat(len(tensors), 1, 1)
        for row, tensor in zip(output, tensors, strict=True):
            row[: len(tensor)] = send(tensor, row.device)
        return output

    def check_state(self, state: Any, index: int) -> Tensor:
        """Text states as a tensor, (k, token_dim); raises as :meth:`pad_states`, with the index."""
        tensor = torch.as_tensor(state) if isinstance(state, np.ndarray) else state
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = getattr(state, "dtype", type(state).__name__)
            raise TypeError(f"prompt {index} must be an array or tensor of floats, got {kind}")
        if tensor.ndim != 2 or tensor.size(1) != self.token_dim or len(tensor) > self.num_tokens:
            raise ValueError(
                f"text states must be (k, {self.token_dim}) with k <= {self.num_tokens}, "
                f"got {tuple(tensor.shape)} for prompt {index}"
            )
        is_readable = type(tensor) is Tensor and tensor.device.type == "cpu"
        if is_readable and not tensor.isfinite().all():
            raise ValueError(f"prompt {index} must be finite, got NaN or infinity")
        return tensor

    @torch.no_grad()
    def drop_states(self, states: Tensor) -> Tensor:
        """Training dropout: some prompts become the null prompt, by one NumPy draw for each.

        Args:
            states: (B, num_tokens, token_dim).

        Returns:
            Same shape; ``states`` itself, without a draw, if ``dropout`` is 0.
        """
        if self.dropout <= 0:
            return states
        is_dropped = torch.from_numpy(np.random.rand(len(states), 1, 1) < self.dropout)
        null = self.weight[: self.num_tokens].to(states)
        return torch.where(send(is_dropped, states.device), null, states)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[Any]) -> Tensor:
        """States of prompts, some of them dropped in training; see :meth:`drop_states`.

        Args:
            prompts: All strings, which ``encoders`` read, or all states as for :meth:`pad_states`.

        Returns:
            (len(prompts), num_tokens, token_dim), dtype and device of this module.

        Raises:
            TypeError: If strings and states are mixed.
            ValueError: If a string is given and no text encoder is attached, and for what
                :meth:`pad_states` lists.
        """
        if isinstance(next(iter(prompts), None), str):
            tokenizer, encoder = self.encoders or (None, None)
            prompts = encode_texts(tokenizer, encoder, prompts, self.num_tokens, self.token_dim)
        states = self.pad_states(prompts)
        return self.drop_states(states) if self.training else states

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
        self.weight = nn.Parameter(torch.zeros(rows, embed_dim))
        nn.init.normal_(self.weight, std=0.02)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed labels.

        Args:
            input_ids: Classes, (B,) or (B, 1), int64 or int32, on any device.

        Returns:
            (B, 1, embed_dim).

        Raises:
            ValueError: If there is no such class (found only on the CPU: on a GPU the check
                would wait for it).
        """
        ids = send(input_ids, self.weight.device)
        ids = ids.unsqueeze(-1) if ids.ndim == 1 else ids
        if self.training and self.dropout > 0:
            kept = torch.rand(ids.shape, device=ids.device) > self.dropout
            ids = torch.where(kept, ids, self.num_classes)
        try:
            rows = F.embedding(ids, self.weight)
        except IndexError as error:
            raise ValueError(
                f"labels must be from 0 to {len(self.weight) - 1}, got {input_ids.tolist()}"
            ) from error
        return self.norm(rows)


@dataclass(frozen=True)
class TrainingMask:
    """Which tokens of each frame are hidden in one training step.

    Attributes:
        hidden: 1 where the token must be predicted, (B, N, 1), in the dtype of the tokens.
        hidden_ids: The tokens to predict, (B, n, 1); one n for the batch.
        known_ids: The visible tokens, (B, N - n, 1).
    """

    hidden: Tensor
    hidden_ids: Tensor
    known_ids: Tensor


class MaskEmbed(nn.Module):
    """The vectors that stand for hidden tokens and for the frame before the first.

    Args:
        embed_dim: Token width.
        mask_ratios: Smallest and largest share of hidden tokens in training; a third number is
            the standard deviation of the truncated normal around the largest.
    """

    def __init__(self, embed_dim: int, mask_ratios: Sequence[float] = (0.7, 1.0)) -> None:
        super().__init__()
        self.mask_ratios = list(mask_ratios) + [0.25] * (len(mask_ratios) == 2)
        self.bos_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        for token in (self.bos_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The vectors of the frame before the first, and of hidden tokens; (1, D) each.

        A call, unlike reading the parameters, also works on offloaded weights.
        """
        return self.bos_token, self.mask_token

    def apply_mask(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Replace hidden tokens with the mask vector.

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
