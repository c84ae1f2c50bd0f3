"""What a target names, what its arguments must be, and the arithmetic of a configuration."""

from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf

from diffnext.config import targets
from diffnext.config.arithmetic import evaluate_arithmetic
from diffnext.config.targets import ConfigError, config_to_class, config_to_object

FRACTION = {"target": "fractions.Fraction", "params": {"numerator": 3}}
NO_ARITHMETIC = ["__import__('os').getcwd()", "().__class__", "'a' * 3", "[1]", "open('x')"]
ENDLESS = ["9 ** 9 ** 9", "((9 ** 999) ** 999) ** 999", "(" * 5000 + "1" + ")" * 5000]


def take(
    rate: float,
    count: int,
    old: int = None,
    format: Literal["bin", "zip"] = "bin",
    betas: tuple[float, float] = (0, 1),
    names: list[str] | list[int] | None = (),
    tensor: float | torch.Tensor = 0.0,
    dtype: torch.dtype = torch.float32,
):
    """Stands for any target."""


@pytest.mark.parametrize(
    "params, wrong",
    [
        ({"rate": 1, "old": None, "format": "zip", "betas": [0.9, 0.95], "names": ["a"]}, ""),
        ({"names": None, "tensor": 0.1, "dtype": "float16", "unknown": 1}, ""),
        ({"rate": True, "count": True, "format": "x", "betas": [0.9]}, "rate count format betas"),
        ({"rate": "1", "count": 1.0, "names": [1, "a"], "tensor": "a"}, "rate count names tensor"),
        ({"rate": b"1", "count": None, "tensor": {"a": 1}}, "rate count tensor"),
    ],
)
def test_arguments_are_compared_with_their_annotations(params, wrong):
    found = targets.wrong_parameters(f"{__name__}.take", params)
    assert [name for name, _ in found] == wrong.split()


def test_class_and_object_come_from_target_and_params():
    config = OmegaConf.create(FRACTION)
    assert config_to_class(config).__name__ == "Fraction"
    assert config_to_object(config, denominator=4) == config_to_object(FRACTION) / 4 == 0.75
    assert config_to_class(None) is None
    assert config_to_object(OmegaConf.create({})) is None


def test_params_may_not_override_what_the_program_supplies():
    with pytest.raises(ConfigError, match="numerator"):
        config_to_object(FRACTION, numerator=1)


@pytest.mark.parametrize("target", ["no.such.Thing", "fractions.No", "Thing", ".x", "math.pi", 3])
def test_a_target_that_cannot_be_called_is_refused(target):
    with pytest.raises(ConfigError, match=f"cannot import target {target!r}"):
        config_to_class({"target": target})


def test_a_missing_target_is_explained():
    with pytest.raises(KeyError, match="Expected key `target` to instantiate"):
        config_to_class({"params": {}})


@pytest.mark.parametrize(
    "expression, value",
    [("7 // 2 + 7 % 4", 6), ("min(3, 2) ** 2", 4), ("-(2 - 5) / round(2.4)", 1.5), ("2 > 1", True)],
)
def test_arithmetic(expression, value):
    assert evaluate_arithmetic(expression) == value


@pytest.mark.parametrize("expression", [*NO_ARITHMETIC, *ENDLESS, "1 /", "1 / 0"])
def test_anything_but_arithmetic_is_refused(expression):
    with pytest.raises(ConfigError, match="cannot evaluate"):
        evaluate_arithmetic(expression)
