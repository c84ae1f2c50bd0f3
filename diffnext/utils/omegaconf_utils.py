"""Configuration files: reading, command-line overrides, saving, and building objects from them."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffnext.utils.config_check import (
    ConfigError,
    Origins,
    all_paths,
    check_keys,
    check_sections,
    check_types,
    did_you_mean,
    import_target,
    known_keys,
    one_line,
)
from diffnext.utils.config_schema import USAGE as USAGE  # other command lines take it from here
from diffnext.utils.config_schema import TrainConfig, iterate_schema


class OmegaConfEncoder(json.JSONEncoder):
    """JSON encoder that writes OmegaConf containers as plain, resolved lists and dicts."""

    def default(self, o: Any) -> Any:
        """Return a JSON value for ``o``."""
        if OmegaConf.is_config(o):
            return OmegaConf.to_container(o, resolve=True)
        return super().default(o)


def get_config(argv: Sequence[str] | None = None, schema: type | None = TrainConfig) -> DictConfig:
    """Merge a YAML file with command-line overrides and check keys and types.

    Args:
        argv: Items with YAML values, applied in order. ``key.path=value`` overrides the file,
            ``+key.path=value`` adds a key that is not in the schema, ``~key.path`` deletes a key.
            One of them is ``config=<file>``. Default: the command line of the process.
        schema: Dataclass of the keys that exist; None for those of the file, of any type.

    Returns:
        The file with the overrides; the key ``config`` stays in it.

    Raises:
        ConfigError: If ``config`` is missing or unreadable, an item is malformed, a key is unknown,
            a value has the wrong type, or an interpolation does not resolve.
    """
    OmegaConf.register_resolver("eval", evaluate_arithmetic, replace=True)
    items = list(sys.argv[1:] if argv is None else argv)
    overrides: Any = OmegaConf.to_container(_parse_overrides(items), resolve=False)
    file_config = _load_yaml(overrides.get("config"))
    config = _apply_items(file_config, items)
    origins = Origins(
        file=str(overrides["config"]),
        command_line=frozenset(all_paths(overrides)),
        forced=frozenset(_key_of(item[1:]) for item in items if item.startswith("+")),
    )
    if schema is None:
        known = {"config"} | all_paths(OmegaConf.to_container(file_config, resolve=False))
        check_keys(config, known, set(), origins)
        return config
    check_keys(config, *known_keys(config, schema), origins)
    check_sections(config, schema)
    # Interpolations may refer to keys that are left to their defaults.
    check_types(fill_defaults(config, schema), schema, origins)
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
    given = all_paths(OmegaConf.to_container(config, resolve=False))
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


def save_config(config: DictConfig, f: str | Path | IO[str]) -> None:
    """Write a configuration as YAML, interpolations unresolved.

    Args:
        config: The configuration.
        f: A path or an open text file.
    """
    OmegaConf.save(config, f)


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
    return import_target(config["target"])


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


def _key_of(item: str) -> str:
    """The dotted key of ``key=value``, where ``a[b]`` is another spelling of ``a.b``."""
    return item.partition("=")[0].replace("[", ".").replace("]", "")


def _parse_overrides(items: Sequence[str]) -> DictConfig:
    """The keys that a command line sets, with and without ``+``."""
    for item in items:
        if item.startswith("-"):
            raise ConfigError(f"arguments are written key=value without dashes, got {item!r}")
        if item.startswith("~") and ("=" in item or item == "~config"):
            raise ConfigError(f"~key deletes a key other than config and has no value, got {item}")
        if item.startswith(("=", "+=")):
            raise ConfigError(f"arguments are written key=value, got {item!r}")
    settings = [item.removeprefix("+") for item in items if not item.startswith("~")]
    try:
        return OmegaConf.from_dotlist(settings)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"cannot parse the arguments {settings}: {one_line(error)}") from error


def _apply_items(file_config: DictConfig, items: Sequence[str]) -> DictConfig:
    """Override, add and delete keys in the order of the command line."""
    config = file_config.copy()
    for deletes, group in itertools.groupby(items, lambda item: item.startswith("~")):
        if deletes:
            for item in group:
                _delete_key(config, item[1:])
            continue
        config = _merge(config, list(group))
    return config


def _merge(config: DictConfig, settings: list[str]) -> DictConfig:
    merged = config.copy()
    try:
        merged.merge_with(_parse_overrides(settings))
        return merged
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if len(settings) == 1:
            reason = one_line(error)
            raise ConfigError(f"cannot apply {settings[0]!r} to the file: {reason}") from error
    for setting in settings:  # one by one, to find which it is
        config = _merge(config, [setting])
    return config


def _delete_key(config: DictConfig, path: str) -> None:
    existing = all_paths(OmegaConf.to_container(config, resolve=False))
    if path not in existing:
        raise ConfigError(f"~{path}: there is no such key{did_you_mean(path, existing)}")
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    del config[name]


def _load_yaml(path: Any) -> DictConfig:
    if path is None:
        raise ConfigError("config is required: add config=<file.yaml> to the command line")
    if not os.path.isfile(str(path)):
        raise ConfigError(f"config={path}: no such file")
    try:
        config = OmegaConf.load(str(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config={path} is not a readable YAML file: {one_line(error)}"
        ) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"config={path} must hold key: value pairs at its top level")
    return config


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    children: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict) and tree:
        children = tree.items()
    elif isinstance(tree, list) and tree:
        children = enumerate(tree)
    else:
        return [(prefix, tree)] if prefix else []
    pairs = []
    for name, value in children:
        pairs += _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return pairs


def _to_plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
