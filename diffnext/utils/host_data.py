"""Data that the host gives a device, or takes from it, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["draw_normal", "fetch", "send"]

Generators = torch.Generator | list[torch.Generator] | None


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From a CPU to a GPU it goes through pinned memory, without a wait."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def fetch(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU.

    Returns:
        Gives the copy. It waits only for the tensor, not for the device's later work.
    """
    if x.device.type != "cuda":
        copied = x.cpu()
        return lambda: copied
    on_its_way = x.to("cpu", non_blocking=True)  # to pinned memory
    arrival = torch.cuda.Event()
    arrival.record()

    def wait() -> Tensor:
        arrival.synchronize()
        return on_its_way

    return wait


def draw_normal(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn where the generator is, which may be the CPU.

    Args:
        shape: Shape of the result; its first dimension is the samples.
        generator: Source; a list gives each sample its own, None is the default of the device.
        like: Gives dtype and device of the result.

    Raises:
        ValueError: If a generator is on a device that the numbers cannot come from.
    """
    first = generator[0] if isinstance(generator, list) else generator
    is_on_host = first is not None and first.device.type == "cpu"
    source = torch.device("cpu") if is_on_host else like.device
    drawn = randn_tensor(tuple(shape), generator, device=source, dtype=like.dtype)
    return send(drawn, like.device)
