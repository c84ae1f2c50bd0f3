"""The class that the ``target`` of a section names, and whether its ``params`` suit it.

Any importable dotted path is accepted, so a configuration file is code: use only files you trust.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from diffnext.utils.messages import explain

__all__ = [
    "ConfigError",
    "config_to_class",
    "config_to_object",
    "import_target",
    "target_parameters",
    "wrong_parameters",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; its arguments are the problems, a line each."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each problem."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


def import_target(target: Any) -> Any:
    """Import what a dotted path names.

    Raises:
        ConfigError: If it cannot be imported, or is not a class or a function.
    """
    module_name, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module may raise anything
        raise ConfigError(f"cannot import target {target!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"cannot import target {target!r}: it is not a class or a function")
    return found


def config_to_class(config: Any) -> Any:
    """Import what ``target`` names.

    Args:
        config: Section with a ``target``, a mapping or a dataclass; empty or None gives None.

    Raises:
        KeyError: If there is no ``target``.
        ConfigError: If the target cannot be imported.
    """
    section = _section(config)
    if not section:
        return None
    if "target" not in section:
        raise KeyError("Expected key `target` to instantiate.")
    return import_target(section["target"])


def config_to_object(config: Any, **kwargs: Any) -> Any:
    """Call what ``target`` names with ``params`` and the given arguments.

    Args:
        config: Section with ``target`` and optional ``params``, a mapping or a dataclass; empty or
            None gives None.
        **kwargs: Arguments supplied by the program.

    Raises:
        ConfigError: If ``params`` contains one of ``kwargs``.
    """
    section = _section(config)
    if not section:
        return None
    target = config_to_class(section)
    params = section.get("params") or {}
    collisions = sorted(set(params) & set(kwargs))
    if collisions:
        raise ConfigError(
            f"params of {section['target']} may not set {', '.join(collisions)}: "
            "the program supplies it"
        )
    return target(**kwargs, **params)


_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def _section(config: Any) -> dict[str, Any]:
    """A section in plain containers, interpolations resolved."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    is_section = is_dataclass(config) and not isinstance(config, type)
    return asdict(config) if is_section else dict(config or {})


def target_parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """The arguments that ``params`` may set; None if they cannot be known."""
    try:
        parameters = inspect.signature(import_target(target)).parameters
    except (ConfigError, TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    # The optimizer's ``params`` are the weights.
    return {name: value for name, value in parameters.items() if name != "params"}


def wrong_parameters(target: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Compare values with the annotations of what they are given to.

    Args:
        target: Dotted path.
        params: Arguments, as a YAML file holds them.

    Yields:
        The name of each wrong argument and the rule it breaks.
    """
    parameters = target_parameters(target) or {}
    target = import_target(target) if parameters else None
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        hints = {}  # annotations of names that exist for type checkers only
    for name, value in params.items():
        # A class may spell ``x: int = None``.
        is_default = name in parameters and value is None and parameters[name].default is None
        if name not in parameters or name not in hints or is_default:
            continue
        try:
            adapter = TypeAdapter[Any](hints[name], config=_STRICT)
            adapter.validate_json(json.dumps(value, default=str))
        except ValidationError as error:
            # Alternatives that no file can hold are left to the target.
            parts = [part for part in error.errors() if part["type"] != "needs_python_object"]
            if parts:
                yield name, explain(parts, depth=0)
        except PydanticUserError:
            pass  # an annotation that is not a type
