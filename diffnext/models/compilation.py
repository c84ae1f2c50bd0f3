"""Compiling for inference: few shapes, which bounds the number of graphs.

Every graph has fixed shapes, and tokens are padded to a few numbers. There is a graph per batch
size, number of guidance passes and padded length; prompts, seeds and guidance scales need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_options", "compile_static", "pad_tokens", "pad_length"]

MOST_GRAPHS = 256  # of one function; only batch sizes are unbounded
FEWEST_TOKENS = 8


def check_options(options: dict[str, Any]) -> None:
    """Check options of ``torch.compile`` for those that cannot work here.

    Raises:
        ValueError: With the reason.
    """
    mode = options.get("mode")
    if mode in ("reduce-overhead", "max-autotune") or (options.get("options") or {}).get(
        "triton.cudagraphs"
    ):
        raise ValueError(
            f"mode={mode!r} replays CUDA graphs, whose results the next block would overwrite: "
            "leave it out, or use mode='max-autotune-no-cudagraphs'"
        )
    if options.get("dynamic"):
        raise ValueError("dynamic=True: shapes are padded to few fixed ones instead, leave it out")
    if mode is not None and mode not in torch._inductor.list_mode_options():
        modes = sorted({*torch._inductor.list_mode_options()} - {"reduce-overhead", "max-autotune"})
        raise ValueError(f"mode must be one of {modes}, got {mode!r}")


def compile_static(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Compile a function once for each set of shapes, apart from other compilations of it."""
    own = {"dynamic": False, "recompile_limit": MOST_GRAPHS, "isolate_recompiles": True}
    compiler: Any = torch.compile  # whose stubs lack the last two
    return compiler(function, **{**options, **own})


def pad_length(length: int, most: int) -> int:
    """The length rounded up to a quarter, half, three quarters or all of the most there can be."""
    quarter = -(-most // 4)
    return min(-(-max(length, 1) // quarter) * quarter, most)


def repeat_last(x: Tensor, length: int) -> Tensor:
    """Tokens or their ids (B, n, ...) with the last repeated, up to a length.

    Repeated tokens give equal results, so it does not matter which one is kept.
    """
    missing = length - x.size(1)
    return torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1) if missing else x


def pad_tokens(x: Tensor, fewest: int = FEWEST_TOKENS) -> Tensor:
    """Tokens or ids (B, n, ...) with the last repeated, up to a power of two, or to ``fewest``."""
    n = x.size(1)
    return repeat_last(x, max(fewest, 1 << (n - 1).bit_length()))
