"""Checked arguments: their kinds and limits stand in the annotations of dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

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
    "naming",
    "one_line",
    "take_checked",
]

T = TypeVar("T")

CHECKED = ConfigDict(strict=True, arbitrary_types_allowed=True)
_MOST = 10**6  # of anything that is counted


def _plain_number(value: Any) -> Any:
    """NumPy's and torch's numbers are numbers, their arrays are not."""
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
    """Make a dataclass of pydantic's; what is wrong is said in one line.

    Raises:
        ValueError: Naming each argument that is wrong, the rule, and the value.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for part in error.errors():
            name = str(part["loc"][0]) if part["loc"] else ""
            rule = part["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            kind = part["type"] if len(part["loc"]) < 2 else f"{part['type']} inside"
            problems.setdefault(name, []).append(_RULES.get(kind, rule))
        lines = [
            f"{name} {_either(rules)}, got {one_line(values[name])}"
            if name in values
            else f"{name} {rules[0]}".strip()
            for name, rules in problems.items()
        ]
        raise ValueError("; ".join(lines)) from None


# Where pydantic's words are not those of a user.
_RULES = {
    "missing": "must be given",
    "missing inside": "must be longer",
    "too_long": "must be shorter",
    "tuple_type": "must be a list or a tuple",
    "unexpected_keyword_argument": "has no use here",
}


def _either(rules: list[str]) -> str:
    """Several rules, of which one must hold, as one."""
    first, *others = dict.fromkeys(rules)
    return " or ".join([first, *(rule.removeprefix("must be ") for rule in others)])


def take_checked(cls: type[T], values: MutableMapping[str, Any]) -> T:
    """Make a dataclass of pydantic's from the values that are its own, which are taken out."""
    names = inspect.signature(cls).parameters.keys() & values.keys()
    return build_checked(cls, {name: values.pop(name) for name in names})


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin what goes wrong inside with the name of the argument that it comes from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def one_line(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim > 1:
        return f"{type(value).__name__} {tuple(value.shape)}, {value.dtype}"
    text = " ".join(f"{value!r}".split())
    return text if len(text) <= 80 else f"{text[:77]}..."
