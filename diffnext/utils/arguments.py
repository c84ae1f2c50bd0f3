"""Checked arguments: the annotations of dataclasses give their types and limits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from diffnext.utils.messages import explain, one_line

__all__ = [
    "CHECKED",
    "AtLeastOne",
    "AtLeastZero",
    "Count",
    "Finite",
    "Flag",
    "LatentFrames",
    "Listed",
    "OnePerSample",
    "Positive",
    "build_checked",
    "take_checked",
]

T = TypeVar("T")

CHECKED = ConfigDict(strict=True, arbitrary_types_allowed=True)
_MOST = 10**6  # of anything that is counted


def _plain_number(value: Any) -> Any:
    """NumPy's and torch's numbers are accepted, their arrays are not."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, (np.ndarray, Tensor)):
        raise ValueError("must be a single number")
    return value


def _as_tuple(value: Any) -> Any:
    """Lists, and arrays and tensors of one axis, in the order they have."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1:
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def _per_sample(value: Any) -> Any:
    """One number, or a number for each sample."""
    values = _as_tuple(value)
    return values if isinstance(values, tuple) else (values,)


def _as_frames(value: Any) -> Any:
    """Latent frames of a list, or of a tensor (B, C, T, h, w)."""
    if isinstance(value, Tensor) and value.ndim == 5:
        return value.unbind(2)
    if isinstance(value, (list, tuple)) and all(isinstance(one, Tensor) for one in value):
        return tuple(value)
    raise ValueError("must be a list of tensors (B, C, h, w) or a tensor (B, C, T, h, w)")


_Number = BeforeValidator(_plain_number)
AtLeastOne = Annotated[int, Field(ge=1, le=_MOST), _Number]
Count = Annotated[int, Field(ge=0, le=_MOST), _Number]
Finite = Annotated[float, Field(allow_inf_nan=False), _Number]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
Flag = Annotated[bool, _Number]
Listed = BeforeValidator(_as_tuple)  # of a tuple that may be given as a list
OnePerSample = BeforeValidator(_per_sample)  # of a tuple of numbers
LatentFrames = Annotated[tuple[Tensor, ...], BeforeValidator(_as_frames)]


def build_checked(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of pydantic's; all errors are in one line.

    Raises:
        ValueError: Naming each argument that is wrong, the rule, and the value.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        problems: dict[str, list[Mapping[str, Any]]] = {}
        for part in error.errors():
            problems.setdefault(str(part["loc"][0]) if part["loc"] else "", []).append(part)
        lines = [
            f"{name} {explain(parts)}, got {one_line(values[name])}"
            if name in values
            else f"{name} {explain(parts)}".strip()
            for name, parts in problems.items()
        ]
        raise ValueError("; ".join(lines)) from None


def take_checked(cls: type[T], values: MutableMapping[str, Any]) -> T:
    """Make a dataclass of pydantic's from the values that are its own, which are taken out."""
    names = inspect.signature(cls).parameters.keys() & values.keys()
    return build_checked(cls, {name: values.pop(name) for name in names})
