"""Which device to use, and which precision on it."""

from __future__ import annotations

import torch

AUTO = "auto"


def get_device(index: int | None = None) -> torch.device:
    """Return an accelerator if there is one: CUDA, then MPS, then the CPU.

    Args:
        index: CUDA device index; None for the current one.
    """
    if torch.cuda.is_available():
        return torch.device("cuda" if index is None else f"cuda:{index}")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def parse_device(name: str = AUTO, index: int | None = None) -> torch.device:
    """The device that a command line names.

    Args:
        name: Such as "cpu", "cuda" or "cuda:1", or "auto" for the best one.
        index: CUDA device where the name leaves it open; None for the current one.

    Raises:
        ValueError: If there is no such device.
    """
    if name == AUTO:
        return get_device(index)
    try:
        device = torch.device(name)
    except RuntimeError:
        known = "auto, cpu, cuda, cuda:1 or mps"
        raise ValueError(f"device {name!r} cannot be used: name {known}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    if device.type == "cuda" and device.index is None and index is not None:
        return torch.device("cuda", index)
    return device


def parse_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a command line names.

    Args:
        name: Of a floating-point type of torch, or "auto" for float16, and for float32 on a CPU,
            which is slow at half precision.
        device: Where it will be used.

    Raises:
        ValueError: If there is no such type.
    """
    if name == AUTO:
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"precision must be a type such as float16 or float32, got {name!r}")
    return dtype
