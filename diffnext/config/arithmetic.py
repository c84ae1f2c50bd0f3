"""The arithmetic of ``${eval:'...'}`` in a configuration."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from diffnext.config.targets import ConfigError


def evaluate_arithmetic(expression: Any) -> Any:
    """Evaluate the ``${eval:'...'}`` of a configuration: arithmetic only.

    Numbers, ``+ - * / // % **``, comparisons, parentheses and ``min max round int float abs``.

    Args:
        expression: Text; other values are returned as they are.

    Raises:
        ConfigError: If the text holds anything else.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _evaluate_node(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ArithmeticError, ValueError) as error:
        raise ConfigError(f"cannot evaluate {expression!r}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise ConfigError(f"cannot evaluate {expression[:40]!r}...: too long") from error


_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable] = {f.__name__: f for f in (min, max, round, int, float, abs)}
_MAX_BITS = 4096  # of a power: 9**9**9 would compute for hours


def _evaluate_node(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate_node(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _evaluate_binary(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        compare = _OPERATORS[type(node.ops[0])]
        return compare(_evaluate_node(node.left), _evaluate_node(node.comparators[0]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in _FUNCTIONS:
            return _FUNCTIONS[node.func.id](*[_evaluate_node(arg) for arg in node.args])
    raise ValueError("only arithmetic on numbers is allowed")


def _evaluate_binary(node: ast.BinOp) -> Any:
    left = _evaluate_node(node.left)
    right = _evaluate_node(node.right)
    if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _MAX_BITS:
            raise ValueError(f"powers are limited to {_MAX_BITS} bits")
    return _OPERATORS[type(node.op)](left, right)
