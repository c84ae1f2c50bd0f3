"""Layers as plain functions, for small ones that are called hundreds of times in a row.

`nn.Module.__call__` and looking up parameters take some 4 us, as long as the product of a small
layer; and where kernels are launched on a GPU, they are most of the time between two launches.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Layer", "direct"]

Layer = Callable[[Tensor], Tensor]


def direct(module: nn.Module) -> Layer:
    """A linear layer, layer norm or SiLU as a function of its present parameters.

    Anything else is returned as it is: other classes, which may be adapters or quantised layers,
    and modules with hooks, which may be offloaded.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return module
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda x: F.linear(x, weight, bias)
    if type(module) is nn.LayerNorm:
        shape, scale, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: F.layer_norm(x, shape, scale, shift, eps)
    return F.silu if type(module) is nn.SiLU else module
