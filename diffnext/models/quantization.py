"""Fewer bits for the weights of a trained model, an approximation. Needs torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["QUANTIZATIONS", "check_not_quantized", "is_quantized", "quantize_blocks"]

QUANTIZATIONS = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8": "Float8WeightOnlyConfig",
}


def quantize_blocks(model: nn.Module, kind: str) -> None:
    """Quantise the linear layers inside the blocks of a model, in place; it cannot be undone.

    Embeddings, norms and heads keep their type: they are small, and their errors are visible.

    Args:
        model: Encoders and diffusion head, each with ``blocks``.
        kind: "int8" and "float8" store weights in a byte each and compute as before; for
            "int8_dynamic" activations are rounded as well, and products are of integers.

    Raises:
        ValueError: If the kind is unknown, or the model is quantised already or offloaded layer by
            layer.
        ImportError: If torchao is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"kind must be one of {sorted(QUANTIZATIONS)}, got {kind!r}")
    check_not_quantized(model, "quantised again")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a model offloaded layer by layer cannot be quantised: quantise it first")
    try:
        from torchao import quantization
    except ImportError as error:
        raise ImportError("quantisation needs torchao: pip install torchao") from error
    config: Any = getattr(quantization, QUANTIZATIONS[kind])()
    quantization.quantize_(model, config, filter_fn=_is_inside_block)


def check_not_quantized(model: nn.Module, what: str) -> None:
    """Check that a model is not quantised, before something that would break it.

    Args:
        model: Any network.
        what: What should be done with it, as a past participle for the message.

    Raises:
        ValueError: If weights of the model are quantised.
    """
    if is_quantized(model):
        raise ValueError(
            f"a quantised model cannot be {what}: load it again, and quantise it last, "
            "after casting or saving it"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of the model are quantised."""
    return any(type(one).__module__.startswith("torchao") for one in model.parameters())


def _is_inside_block(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".blocks." in f".{name}"
