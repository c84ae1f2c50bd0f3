"""Configuration files: reading, command-line overrides, saving, and building objects from them."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffnext.utils.config_schema import TrainConfig, iterate_schema

USAGE = "usage: {program} config=FILE.yaml [key.path=value ...] [+new.key=value ...]"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and why."""


class OmegaConfEncoder(json.JSONEncoder):
    """JSON encoder that writes OmegaConf containers as plain, resolved lists and dicts."""

    def default(self, o: Any) -> Any:
        """Return a JSON value for ``o``."""
        if OmegaConf.is_config(o):
            return OmegaConf.to_container(o, resolve=True)
        return super().default(o)


def get_config(argv: Sequence[str] | None = None, schema: type | None = TrainConfig) -> DictConfig:
    """Merge a YAML file with command-line overrides.

    Args:
        argv: ``key.path=value`` items with YAML values; one of them is ``config=<file>``. A leading
            ``+`` adds a key which is neither in the file nor in the schema. Default: the
            command line of the process.
        schema: Dataclass of the keys that exist besides those of the file, or None.

    Returns:
        The file with the overrides applied in order; the key ``config`` stays in it.

    Raises:
        ConfigError: If ``config`` is missing or unreadable, an item is malformed, or an override
            names an unknown key.
    """
    OmegaConf.register_resolver("eval", evaluate_arithmetic, replace=True)
    items = list(sys.argv[1:] if argv is None else argv)
    forced = [item[1:] for item in items if item.startswith("+")]
    checked = [item for item in items if not item.startswith("+")]
    overrides = _parse_overrides(checked)
    file_config = _load_yaml(overrides.get("config"))
    config = OmegaConf.merge(file_config, _parse_overrides([*checked, *forced]))
    _check_overrides(overrides, file_config, config, schema)
    return config


def require_keys(config: DictConfig, paths: Iterable[str]) -> None:
    """Check that keys are present and not null.

    Args:
        config: A merged configuration.
        paths: Dotted keys.

    Raises:
        ConfigError: Naming the first missing key and how to give it.
    """
    for path in paths:
        if OmegaConf.select(config, path) is None:
            raise ConfigError(f"{path} is required: add {path}=... to the command line")


def fill_defaults(config: DictConfig, schema: type = TrainConfig) -> DictConfig:
    """Add the schema's defaults for keys that a configuration leaves out; null counts as given.

    Sections that are off by default stay off, and arguments of a ``target`` (its ``params``) are
    left to its own defaults.

    Args:
        config: A merged configuration.
        schema: Dataclass of its keys.

    Returns:
        A new configuration.
    """
    filled = config.copy()
    given = _all_paths(OmegaConf.to_container(config, resolve=False))
    switched_off: tuple[str, ...] = ()
    for item in iterate_schema(schema):
        if item.section is not None:
            if item.default is None and OmegaConf.select(config, item.path) is None:
                switched_off += (f"{item.path}.",)
            continue
        has_default = not item.required and item.default is not None
        if item.path in given or not has_default or ".params." in item.path:
            continue
        if not item.path.startswith(switched_off):
            OmegaConf.update(filled, item.path, item.default)
    return filled


def save_config(config: DictConfig, file: str | os.PathLike | IO) -> None:
    """Write a configuration as YAML, interpolations unresolved.

    Args:
        config: The configuration.
        file: A path or an open text file.
    """
    OmegaConf.save(config, file)


def config_to_yaml(config: DictConfig) -> str:
    """Return a configuration as YAML text, interpolations unresolved."""
    return OmegaConf.to_yaml(config)


def config_to_class(config: Mapping[str, Any] | None) -> Any:
    """Import what the key ``target`` names.

    Any importable dotted path is accepted, so a configuration file is code: use only files you
    trust.

    Args:
        config: Section with a ``target``; empty or None gives None.

    Raises:
        KeyError: If there is no ``target``.
        ConfigError: If the target cannot be imported.
    """
    if not config:
        return None
    if "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    module_name, _, name = str(config["target"]).rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import target {config['target']!r}: {error}") from error


def config_to_object(config: Mapping[str, Any] | None, **kwargs: Any) -> Any:
    """Call what ``target`` names with ``params`` and the given arguments.

    Args:
        config: Section with ``target`` and optional ``params``; empty or None gives None.
        **kwargs: Arguments supplied by the program.

    Raises:
        ConfigError: If ``params`` contains one of ``kwargs``.
    """
    if not config:
        return None
    target = config_to_class(config)
    params = _to_plain(config.get("params") or {})
    collisions = sorted(set(params) & set(kwargs))
    if collisions:
        raise ConfigError(
            f"params of {config['target']} may not set {', '.join(collisions)}: "
            "the program supplies it"
        )
    return target(**kwargs, **params)


def flatten_omega_conf(cfg: DictConfig | ListConfig, resolve: bool = True) -> list[tuple[str, Any]]:
    """List the leaves of a configuration.

    Args:
        cfg: A configuration; list elements are named by their index.
        resolve: Replace interpolations by their values.

    Returns:
        Pairs of dotted key and value.
    """
    return _flatten(OmegaConf.to_container(cfg, resolve=resolve))


def evaluate_arithmetic(expression: Any) -> Any:
    """Evaluate the ``${eval:'...'}`` of a configuration: arithmetic and nothing else.

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
_FUNCTIONS = {"min": min, "max": max, "round": round, "int": int, "float": float, "abs": abs}
_MAX_EXPONENT = 1000  # 9**9**9 would compute for hours


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
    if isinstance(node.op, ast.Pow) and abs(right) > _MAX_EXPONENT:
        raise ValueError(f"exponents are limited to {_MAX_EXPONENT}, got {right}")
    return _OPERATORS[type(node.op)](left, right)


def _parse_overrides(items: Sequence[str]) -> DictConfig:
    for item in items:
        if item.startswith("-"):
            raise ConfigError(f"arguments are written key=value without dashes, got {item!r}")
    try:
        return OmegaConf.from_dotlist(list(items))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"cannot parse the arguments {list(items)}: {error}") from error


def _load_yaml(path: str | None) -> DictConfig:
    if path is None:
        raise ConfigError("config is required: add config=<file.yaml> to the command line")
    if not os.path.isfile(path):
        raise ConfigError(f"config={path}: no such file")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} is not a readable YAML file: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"config={path} must hold key: value pairs at its top level")
    return config


def _check_overrides(
    overrides: DictConfig, file_config: DictConfig, config: DictConfig, schema: type | None
) -> None:
    """Refuse overrides of keys that nothing would read."""
    known, open_keys = _known_keys(file_config, config, schema)
    for path, _ in _flatten(OmegaConf.to_container(overrides, resolve=False), lists=False):
        if path in known or any(path.startswith(f"{prefix}.") for prefix in open_keys):
            continue
        raise ConfigError(_unknown_key_message(path, known))


def _unknown_key_message(path: str, known: set[str]) -> str:
    leaf = path.rpartition(".")[2]
    close = [name for name in sorted(known) if name.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {path!r}: {hint}(write +{path}=... to add a new key)"


def _known_keys(
    file_config: DictConfig, config: DictConfig, schema: type | None
) -> tuple[set[str], set[str]]:
    """Keys that may be overridden, and keys under which anything may stand."""
    known = {"config"} | _all_paths(OmegaConf.to_container(file_config, resolve=False))
    open_keys = set()
    for item in iterate_schema(schema) if schema is not None else ():
        known.add(item.path)
        if not item.open:
            continue
        section, _, name = item.path.rpartition(".")
        accepted = _accepted_arguments(config, section) if name == "params" else None
        if accepted is None:
            open_keys.add(item.path)
        else:
            known |= {f"{item.path}.{argument}" for argument in accepted}
    return known, open_keys


def _accepted_arguments(config: DictConfig, section: str) -> list[str] | None:
    """Argument names of the class a section targets; None if they cannot be known."""
    try:
        target = config_to_class(OmegaConf.select(config, section))
        parameters = inspect.signature(target).parameters.values()
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _all_paths(tree: Any, prefix: str = "") -> set[str]:
    """Dotted paths of all nodes below a tree of dicts, inner ones included."""
    paths = set()
    for name, value in tree.items() if isinstance(tree, dict) else ():
        paths.add(f"{prefix}{name}")
        paths |= _all_paths(value, f"{prefix}{name}.")
    return paths


def _flatten(tree: Any, prefix: str = "", lists: bool = True) -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        children = tree.items()
    elif isinstance(tree, list) and tree and lists:
        children = enumerate(tree)
    else:
        return [(prefix, tree)] if prefix else []
    pairs = []
    for name, value in children:
        pairs += _flatten(value, f"{prefix}.{name}" if prefix else str(name), lists)
    return pairs


def _to_plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
