"""Linear layers whose weights are laid out for the processor's matrix kernels (oneDNN).

Where PyTorch multiplies float32 matrices with another library, this can be faster, for example on
AMD processors; results are equal up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PackedLinear", "prepack_linears"]


class PackedLinear(nn.Linear):
    """A linear layer that keeps a packed copy of its weight for inference in float32 on a CPU.

    The copy is made again when the weight has changed. In all other cases (training, autocast,
    other devices and types, compilation) it works like an ordinary linear layer.

    Args:
        linear: The layer whose parameters it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.training = linear.training
        # The packed weight (held, so its address cannot be reused), its version, and the copy.
        self._packed: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        is_compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_compiled or not self._takes(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._pack(), self.bias, "none", [], "")

    def forget(self) -> None:
        """Pack the weight again at the next call."""
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of; they pack for themselves."""
        return {**self.__dict__, "_packed": None}

    def _takes(self, x: Tensor) -> bool:
        """Whether packed weights are of use for this input."""
        return (
            not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and type(x) is Tensor  # and not a fake one, or another subclass
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()
            and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, self.weight))
        )

    def _pack(self) -> Tensor:
        weight = self.weight.detach()
        last = self._packed  # read once: other threads may replace it
        if last is not None and last[0].data_ptr() == weight.data_ptr():
            if last[1] == weight._version:
                return last[2]
        version = weight._version
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._packed = (weight, version, packed)
        return packed


def forget_packed(model: nn.Module) -> None:
    """Pack a model's weights again when they are next used: they were changed out of sight."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.forget()


def prepack_linears(model: nn.Module) -> None:
    """Pack the linear layers of a model, in place; parameters and their names stay.

    Args:
        model: In float32, on a CPU. Its linear layers then take twice their memory.

    Raises:
        ValueError: If it is not, or if this PyTorch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("prepacking needs a PyTorch that was built with oneDNN")
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise ValueError(
            "prepacking is for float32 on a CPU, "
            f"the model is {parameter.dtype} on {parameter.device}"
        )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and type(child.weight) is nn.Parameter:
                setattr(module, name, PackedLinear(child))
