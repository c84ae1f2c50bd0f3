"""A GPU that is not there: tensors on ``cuda`` without data, next to real ones on the CPU.

Shapes, dtypes and devices are those of a real run, and so are the operations that would reach the
device. No value can be read, so that whatever would wait for the device is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["DEVICE", "FakeCuda", "move_to_fake_cuda"]

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one, as tensors of another are converted
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
NOTHING_TO_LAUNCH = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("_unsafe_view", "lift_fresh", "alias", "detach", "device"),
}


class FakeCuda(TorchDispatchMode):
    """Runs operations on the device with fake tensors, all others for real, and counts.

    Attributes:
        launches: How often each operation was given to the device; views and allocations are none.
        pageable: How often data went to the device from pageable memory, for which the host waits.

    Raises:
        AssertionError: If an operation has to wait for the device, or its tensors are of more than
            one floating-point type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.pageable: Counter[tuple[int, ...]] = Counter()
        self._without_driver = WithoutDriver(self._copy)
        self._pinned = WeakIdKeyDictionary()

    @property
    def total(self) -> int:
        """Operations given to the device so far."""
        return sum(self.launches.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        device = torch.device(options.get("device") or "cpu")
        if device.type == "cuda" or any(isinstance(one, FakeTensor) for one in tensors):
            self._check(function, tensors, device, options)
            return function(*args, **options)
        with unset_fake_temporarily():
            return self._run_on_cpu(function, args, options)

    def __enter__(self) -> FakeCuda:
        MODE.__enter__()  # also keeps PyTorch from looking for a driver
        self._without_driver.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._without_driver.__exit__(*error)
        MODE.__exit__(*error)

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        self._check(aten.copy_.default, [target, source], target.device, {})
        return target

    def _run_on_cpu(self, function: Any, args: Any, options: dict[str, Any]) -> Any:
        """A real operation; there is no driver to pin memory with, so that it is only noted."""
        is_pinned = options.pop("pin_memory", None)
        if function.overloadpacket in (aten.is_pinned, aten._pin_memory):
            if function.overloadpacket is aten.is_pinned:
                return args[0] in self._pinned
            function, options, is_pinned = aten.clone.default, {}, True
        result = function(*args, **options)
        if is_pinned:
            self._pinned[result] = True
        return result

    def _check(
        self, function: Any, tensors: list[Tensor], device: torch.device, options: dict[str, Any]
    ) -> None:
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, tensors, device, options)
        else:
            kinds = {one.dtype for one in tensors if one.is_floating_point()}
            assert len(kinds) <= 1, f"{name} of {kinds}"
        if not function.is_view and name not in NOTHING_TO_LAUNCH:
            self.launches[name] += 1

    def _check_copy(
        self, name: str, tensors: list[Tensor], device: torch.device, options: dict[str, Any]
    ) -> None:
        source = tensors[-1]
        target = tensors[0].device if name == "copy_" else device
        if "device" not in options and name != "copy_":
            return  # a cast
        assert target.type == "cuda", f"{tuple(source.shape)} is copied to the host"
        if source.device.type == "cpu" and source not in self._pinned:
            self.pageable[tuple(source.shape)] += 1


class WithoutDriver(TorchFunctionMode):
    """What asks the driver even for a fake tensor: brackets, copies in place, which attention.

    Args:
        copy: Stands for ``copy_``.
    """

    def __init__(self, copy: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._copy = copy

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return take(*args)
        if function is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            x, index, value = args
            part = take(x, index)
            return self._copy(part, value) if isinstance(value, Tensor) else part.fill_(value)
        if function is Tensor.copy_ and isinstance(args[0], FakeTensor):
            return self._copy(*args[:2])
        if function is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that a GPU takes: flash attention in half precision, else the efficient one."""
    if q.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False)[0]


def take(x: Tensor, index: Any) -> Tensor:
    """What brackets give for numbers, slices, ``None`` and an ellipsis, or for one tensor."""
    if isinstance(index, Tensor):
        return aten.index.Tensor(x, [index])
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = x.ndim - sum(item is not None for item in items) + 1
        items[at : at + 1] = [slice(None)] * missing
    dim = 0
    for item in items:
        if item is None:
            x = x.unsqueeze(dim)
        elif isinstance(item, int):
            x = x.select(dim, item)
            continue
        else:
            start, stop, step = item.indices(x.size(dim))
            x = aten.slice.Tensor(x, dim, start, max(start, stop), step)
        dim += 1
    return x


def move_to_fake_cuda(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module on the device, without data.

    Args:
        build: Makes the module.
        dtype: Of its weights; the exponents of rotary positions stay float32.
    """
    with torch.device("meta"):
        module = build().eval()
    with MODE:
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
                    part._parameters[name] = nn.Parameter(fake)
            for name, buffer in part._buffers.items():
                kept = torch.float32 if name.startswith("scale") else dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=kept, device=DEVICE)
    return module
