"""A GPU that is not there: tensors on ``cuda`` without data, next to real ones on the CPU.

Shapes, dtypes and devices are those of a real run, and so are the operations that would reach the
device, with gradients and under autocast. No value can be read, so that whatever would wait for
the device is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["DEVICE", "CudaTensor", "FakeCuda", "move_to_fake_cuda"]

DEVICE = torch.device("cuda", 0)
MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one, as tensors of another are converted
aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
NOTHING_TO_LAUNCH = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "alias", "detach", "device"),
}
# Those of PyTorch's lists for CUDA that occur here (aten/src/ATen/autocast_mode.h).
AUTOCAST_TO_HALF = {"linear", "matmul", "conv2d", "scaled_dot_product_attention"}
AUTOCAST_TO_FLOAT = {"layer_norm", "pow", "exp", "sum", "norm"}


class CudaTensor(Tensor):
    """A tensor on the device.

    PyTorch's core sees a tensor of the meta device: a fake tensor alone would say that it is on the
    device, and a driver be asked for as soon as gradients are recorded.

    Attributes:
        fake: The fake tensor that operations run on.
    """

    fake: FakeTensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, fake: FakeTensor) -> CudaTensor:
        x = Tensor._make_wrapper_subclass(
            cls, fake.shape, strides=fake.stride(), dtype=fake.dtype, device="meta"
        )
        x.fake = fake
        return x

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise RuntimeError(f"{function} needs the device outside of FakeCuda")


class FakeCuda(TorchDispatchMode):
    """Runs operations on the device without data, all others for real, and counts.

    Args:
        may_mix: Whether operations may have tensors of several floating-point types, as under
            autocast. Those that PyTorch refuses are errors all the same.

    Attributes:
        launches: How often each operation was given to the device; views and allocations are none.
        pageable: How often data went to the device from pageable memory, for which the host waits.
        fetched: How often data began its way to the host, through pinned memory; zeros arrive.

    Raises:
        AssertionError: If an operation has to wait for the device, or its tensors are of more than
            one floating-point type, or on two devices.
    """

    def __init__(self, may_mix: bool = False) -> None:
        super().__init__()
        self.may_mix = may_mix
        self.launches: Counter[str] = Counter()
        self.pageable: Counter[tuple[int, ...]] = Counter()
        self.fetched: Counter[tuple[int, ...]] = Counter()
        self._pinned = WeakIdKeyDictionary()
        self._entered = ExitStack()

    @property
    def total(self) -> int:
        """Operations given to the device so far."""
        return sum(self.launches.values())

    def __enter__(self) -> FakeCuda:
        self._entered.enter_context(MODE)  # also keeps PyTorch from looking for a driver
        driver = {"Event": mock.Mock, "is_bf16_supported": lambda: True}
        self._entered.enter_context(mock.patch.multiple(torch.cuda, **driver))
        is_missing = "torch.cuda.amp.common.amp_definitely_not_available"
        self._entered.enter_context(mock.patch(is_missing, lambda: False))
        takes_lists = "torch.utils._foreach_utils._has_foreach_support"
        self._entered.enter_context(mock.patch(takes_lists, lambda *_: True))
        takes_lists = "torch.nn.utils.clip_grad._has_foreach_support"
        self._entered.enter_context(mock.patch(takes_lists, lambda *_: True))
        self._entered.enter_context(WithoutDriver())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if options.get("device") == torch.device("meta"):  # as the core calls the device
            options["device"] = DEVICE
        leaves, structure = tree_flatten((args, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        own = {id(one.fake): one for one in tensors if isinstance(one, CudaTensor)}
        device = torch.device(options.get("device") or ("cuda" if own else "cpu"))
        if not own and device.type == "cpu":
            with unset_fake_temporarily():
                return self._run_on_cpu(function, args, options)
        is_to_host = function.overloadpacket is aten.copy_ and not isinstance(args[0], CudaTensor)
        if device.type == "cpu" or is_to_host:
            return self._fetch(function, args, options)
        if function.overloadpacket is aten._to_copy and is_there(tensors[0], **options):
            return tensors[0]
        self._check(function, tensors)
        leaves = [leaf.fake if isinstance(leaf, CudaTensor) else leaf for leaf in leaves]
        args, options = tree_unflatten(leaves, structure)
        outputs, structure = tree_flatten(function(*args, **options))
        return tree_unflatten([wrap(output, own) for output in outputs], structure)

    def _run_on_cpu(self, function: Any, args: Any, options: dict[str, Any]) -> Any:
        """A real operation; there is no driver to pin memory with, so that it is only noted."""
        is_pinned = options.pop("pin_memory", None)
        if function.overloadpacket in (aten.is_pinned, aten._pin_memory):
            if function.overloadpacket is aten.is_pinned:
                return self._is_pinned(args[0])
            function, options, is_pinned = aten.clone.default, {}, True
        result = function(*args, **options)
        if is_pinned:
            self._pinned[result.untyped_storage()] = True
        return result

    def _fetch(self, function: Any, args: Any, options: dict[str, Any]) -> Tensor:
        name, shape = function.overloadpacket.__name__, tuple(args[0].shape)
        is_blocking = not options.get("non_blocking", args[-1] is True)
        assert name in ("_to_copy", "copy_") and not is_blocking, f"{name} of {shape} to the host"
        self.fetched[shape] += 1
        if name == "copy_":
            assert self._is_pinned(args[0]), f"{shape} is copied to pageable memory"
            return args[0]
        with unset_fake_temporarily():
            result = torch.zeros(shape, dtype=options.get("dtype") or args[0].dtype)
            self._pinned[result.untyped_storage()] = True
        return result

    def _is_pinned(self, x: Tensor) -> bool:
        with unset_fake_temporarily():
            return x.untyped_storage() in self._pinned

    def _check(self, function: Any, tensors: list[Tensor]) -> None:
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("_to_copy", "copy_"):
            source = tensors[-1]
            if not isinstance(source, CudaTensor) and not self._is_pinned(source):
                self.pageable[tuple(source.shape)] += 1
        elif not self.may_mix:
            kinds = {one.dtype for one in tensors if one.is_floating_point()}
            assert len(kinds) <= 1, f"{name} of {kinds}"
        if not function.is_view and name not in NOTHING_TO_LAUNCH:
            self.launches[name] += 1


def wrap(output: Any, own: dict[int, CudaTensor]) -> Any:
    """The tensor on the device for a result; the same one for what was changed in place."""
    if not isinstance(output, FakeTensor):
        return output
    return own[id(output)] if id(output) in own else CudaTensor(output)


def is_there(x: Tensor, dtype: torch.dtype | None = None, **_: Any) -> bool:
    """Whether a tensor need not be copied to the device, which PyTorch's core takes for another."""
    return isinstance(x, CudaTensor) and dtype in (None, x.dtype)


class WithoutDriver(TorchFunctionMode):
    """What PyTorch's core decides by a tensor's device: attention's kernel, and autocast."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if torch.is_autocast_enabled("cuda"):
            args, options = autocast(function, args, options)
        if function is F.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            return attend(*args, **options)
        return function(*args, **options)


def autocast(function: Any, args: Any, options: dict[str, Any]) -> Any:
    """The arguments of a function as autocast hands them on, without its cache of weights."""
    name = getattr(function, "__name__", "")
    if name not in AUTOCAST_TO_HALF | AUTOCAST_TO_FLOAT:
        return args, options
    dtype = torch.get_autocast_dtype("cuda") if name in AUTOCAST_TO_HALF else torch.float32

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, CudaTensor) and x.is_floating_point() else x

    return tree_map(cast, (args, options))


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that a GPU takes: flash attention in half precision, else the efficient one."""
    if q.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needs_gradient)[0]


def move_to_fake_cuda(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module on the device, without data.

    Args:
        build: Makes the module.
        dtype: Of its weights; the exponents of rotary positions stay float32.
    """
    with torch.device("meta"):
        module = build().eval()
    with FakeCuda():
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    own = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
                    part._parameters[name] = nn.Parameter(own)
            for name, buffer in part._buffers.items():
                kept = torch.float32 if name.startswith("scale") else dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=kept, device=DEVICE)
    return module
