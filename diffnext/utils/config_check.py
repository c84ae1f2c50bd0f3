"""Checks of a configuration against its schema: unknown keys and wrong types."""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from diffnext.utils.config_schema import iterate_schema

SHOWN_CHARACTERS = 80  # of a value in a message


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and why."""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the keys of a configuration were written.

    Attributes:
        file: The YAML file.
        command_line: Dotted keys given on the command line.
        forced: Those given with a ``+``: they and what stands below them need not be known.
    """

    file: str
    command_line: frozenset[str]
    forced: frozenset[str]

    def place(self, path: str) -> str:
        """Say where a key was written."""
        return "on the command line" if path in self.command_line else f"in {self.file}"

    def is_forced(self, path: str) -> bool:
        """Whether a key was added with ``+``."""
        return any(path == key or path.startswith(f"{key}.") for key in self.forced)


@dataclass(frozen=True)
class _Mismatch:
    """A value of the wrong type."""

    path: str
    message: str


# Unknown keys


def check_keys(config: DictConfig, known: set[str], open_keys: set[str], origins: Origins) -> None:
    """Refuse keys that nothing would read.

    Args:
        config: A merged configuration.
        known: Dotted keys that exist.
        open_keys: Keys under which anything may stand.
        origins: Where the keys were written.

    Raises:
        ConfigError: Naming the first unknown key, where it was written and the nearest known one.
    """
    for path in leaf_paths(OmegaConf.to_container(config, resolve=False)):
        is_open = any(path.startswith(f"{prefix}.") for prefix in open_keys)
        if path in known or is_open or origins.is_forced(path):
            continue
        way_out = f"write +{path}=... to add a new key"
        if path not in origins.command_line:
            way_out = f"write +{path}=... to keep it, ~{path} to drop it"
        reason = _missing_argument(config, path) + did_you_mean(path, known)
        raise ConfigError(f"unknown key {path!r} {origins.place(path)}{reason} ({way_out})")


def did_you_mean(path: str, known: set[str]) -> str:
    """Suggest the known key nearest to an unknown one; empty if none is near."""
    section, _, leaf = path.rpartition(".")
    siblings = [name for name in sorted(known) if name.rpartition(".")[0] == section]
    leaves = [name.rpartition(".")[2] for name in siblings]
    close = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(leaf, leaves)]
    if not close:  # the right key in a wrong section, or a misspelt section
        same_leaf = [name for name in sorted(known) if name.rpartition(".")[2] == leaf]
        close = difflib.get_close_matches(path, same_leaf, cutoff=0.0)
    return f": did you mean {close[0]!r}?" if close else ""


def _missing_argument(config: DictConfig, path: str) -> str:
    """Name the class that does not take an argument; empty for other keys."""
    section, _, params = path.rpartition(".")[0].rpartition(".")
    if params != "params" or not OmegaConf.select(config, f"{section}.target"):
        return ""
    return f", which {OmegaConf.select(config, f'{section}.target')} does not take"


def known_keys(config: DictConfig, schema: type) -> tuple[set[str], set[str]]:
    """Keys that exist, and keys under which anything may stand.

    The ``params`` beside a ``target`` are the arguments of that class, if they can be known.

    Args:
        config: A merged configuration.
        schema: Dataclass of its keys.
    """
    known = {"config"}
    open_keys = set()
    for item in iterate_schema(schema):
        known.add(item.path)
        if not item.open:
            continue
        parameters = _target_parameters(config, item.path)
        if parameters is None:
            open_keys.add(item.path)
        else:
            # The optimizer's ``params`` are the weights.
            names = [name for name in parameters if name != "params" and name[0] != "_"]
            known |= {f"{item.path}.{name}" for name in names}
    return known, open_keys


def import_target(target: Any) -> Any:
    """Import what a dotted path names.

    Raises:
        ConfigError: If it cannot be imported.
    """
    module_name, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import target {target!r}: {error}") from error


def _target_parameters(
    config: DictConfig, params_path: str
) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of the class that a section targets; None if they cannot be known."""
    section, _, name = params_path.rpartition(".")
    if name != "params":
        return None
    try:
        target = import_target(OmegaConf.select(config, f"{section}.target"))
        parameters = inspect.signature(target).parameters
    except (ConfigError, OmegaConfBaseException, TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return parameters


# Wrong types


def check_sections(config: DictConfig, schema: type) -> None:
    """Check that sections hold keys; one that is null counts as left out.

    Args:
        config: A merged configuration.
        schema: Dataclass of its keys.

    Raises:
        ConfigError: Naming the first section with another value.
    """
    tree = OmegaConf.to_container(config, resolve=False)
    for item in iterate_schema(schema):
        if item.section is None and not item.open:
            continue
        is_given, value = look_up(tree, item.path)
        is_interpolation = isinstance(value, str) and "${" in value
        if is_given and value is not None and not is_interpolation and not isinstance(value, dict):
            raise ConfigError(f"{item.path} must hold key: value pairs, got {_show(value)}")


def check_types(config: DictConfig, schema: type, origins: Origins) -> None:
    """Check the types of all values, interpolations resolved.

    Args:
        config: A merged configuration.
        schema: Dataclass of its keys.
        origins: Where the keys were written.

    Raises:
        ConfigError: Naming key, type and value of the first value of a wrong type, or a key which
            does not resolve.
    """
    mismatches = list(_find_mismatches(config, schema))
    if not mismatches:
        return
    unresolved = OmegaConf.to_container(config, resolve=False)

    def refers_to_another(mismatch: _Mismatch) -> bool:
        return "${" in str(look_up(unresolved, mismatch.path)[1])

    # A wrong value that others refer to is wrong where it was written.
    first = min(mismatches, key=refers_to_another)
    raise ConfigError(f"{first.message}, {origins.place(first.path)}")


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return plain containers with all interpolations replaced by their values.

    Raises:
        ConfigError: Naming the key that does not resolve.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = one_line(_find_cause(config) or error)
        raise ConfigError(f"the configuration does not resolve: {reason}") from error


def _find_cause(config: DictConfig) -> OmegaConfBaseException | None:
    """The error of the first value that fails by itself, not only through another one."""
    tree = OmegaConf.to_container(config, resolve=False)
    failures = {}
    for path in leaf_paths(tree):
        try:
            OmegaConf.select(config, path)
        except OmegaConfBaseException as error:
            failures[path] = error
    for path, error in failures.items():
        text = str(look_up(tree, path)[1])
        if not any(f"${{{other}}}" in text for other in failures if other != path):
            return error
    return None


def one_line(error: Exception) -> str:
    """Say in one line what YAML and OmegaConf say in several."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        message = str(error).splitlines()[0]
        message = message.removeprefix("ConfigError raised while resolving interpolation: ")
        return f"{error.full_key}: {message}"
    return " ".join(str(error).split())


def _find_mismatches(config: DictConfig, schema: type) -> Iterator[_Mismatch]:
    values = resolve(config)
    for item in iterate_schema(schema):
        is_given, value = look_up(values, item.path)
        if not is_given or item.section is not None:
            continue
        if value is None and item.required:
            raise ConfigError(f"{item.path} is required: add {item.path}=... to the command line")
        if item.open:
            yield from _find_parameter_mismatches(config, item.path, value)
        elif not fits(value, item.hint):
            message = _describe_mismatch(item.path, item.type_name, item.hint, value)
            yield _Mismatch(item.path, message)


def _find_parameter_mismatches(config: DictConfig, path: str, given: Any) -> Iterator[_Mismatch]:
    """Compare ``params`` with the annotations of the class that is beside them."""
    parameters = _target_parameters(config, path)
    if parameters is None or not isinstance(given, dict):
        return
    target = import_target(OmegaConf.select(config, f"{path.rpartition('.')[0]}.target"))
    hints = _type_hints(target)
    for name, value in given.items():
        if name not in parameters or name not in hints:
            continue
        # A class may spell ``x: int = None``.
        is_default = value is None and parameters[name].default is None
        if not is_default and not fits(value, hints[name]):
            type_name = inspect.formatannotation(hints[name])
            message = _describe_mismatch(f"{path}.{name}", type_name, hints[name], value)
            yield _Mismatch(f"{path}.{name}", message)


def _type_hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}  # annotations of names that exist for type checkers only


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration has a type; an int is a float as well, a bool is neither.

    Args:
        value: Null, a bool, number or text, or a list or dict of these.
        hint: Type annotation. Classes which no YAML file can hold fit everything by themselves,
            and nothing in a union with others.
    """
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        known = [argument for argument in arguments if _is_plain(argument)]
        others = [argument for argument in known if argument is not type(None)]
        return any(fits(value, argument) for argument in known) or not others
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if not _is_plain(hint):
        return True
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if (origin or hint) is dict:
        return isinstance(value, dict)
    return isinstance(value, list) and _elements_fit(value, origin, arguments)


def _elements_fit(values: list, origin: Any, arguments: Sequence[Any]) -> bool:
    is_fixed = origin is tuple and arguments and arguments[-1] is not Ellipsis
    if is_fixed:
        pairs = zip(values, arguments, strict=False)
        return len(values) == len(arguments) and all(fits(*pair) for pair in pairs)
    return not arguments or all(fits(value, arguments[0]) for value in values)


def _is_plain(hint: Any) -> bool:
    """Whether a YAML file can hold values of a type."""
    sequences = (list, tuple, Sequence)
    origin = typing.get_origin(hint)
    return origin is Literal or (origin or hint) in (
        *(type(None), bool, int, float, str, dict, typing.Union, types.UnionType),
        *sequences,
    )


def _describe_mismatch(path: str, type_name: str, hint: Any, value: Any) -> str:
    if typing.get_origin(hint) is Literal:
        type_name = " or ".join(str(choice) for choice in typing.get_args(hint))
    return f"{path} must be {type_name}, got {_show(value)}{_remedy(hint, value)}"


def _remedy(hint: Any, value: Any) -> str:
    """How a value could be meant; empty if there is no telling."""
    if isinstance(value, str) and fits(0.0, hint) and _is_number(value):
        return " (a number is written without quotes)"
    if isinstance(value, float) and value.is_integer() and fits(int(value), hint):
        return f" (write {int(value)})"
    if isinstance(value, bool | int | float) and fits("", hint):
        return f" (a text of digits needs two pairs of quotes: '\"{value}\"')"
    if isinstance(value, bool | int | float | str) and fits([value], hint):
        return f" (a list is written [{value}])"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    """Write a value as in YAML, if it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


# Trees of plain containers


def all_paths(tree: Any, prefix: str = "") -> set[str]:
    """Dotted paths of all nodes below a tree of dicts, inner ones included."""
    paths = set()
    for name, value in tree.items() if isinstance(tree, dict) else ():
        paths.add(f"{prefix}{name}")
        paths |= all_paths(value, f"{prefix}{name}.")
    return paths


def leaf_paths(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the values of a tree of dicts, in order; lists are values."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaf_paths(value, f"{path}.")
        else:
            yield path


def look_up(tree: Any, path: str) -> tuple[bool, Any]:
    """Whether a tree of dicts has a dotted path, and its value."""
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False, None
        tree = tree[name]
    return True, tree
