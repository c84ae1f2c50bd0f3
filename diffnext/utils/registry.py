"""Named constructors."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Registry"]


class Registry:
    """A mapping from names to constructors with some arguments already given.

    Args:
        name: Name of the registry, for error messages.

    Attributes:
        registry: The entries in order of registration, ``functools.partial`` objects.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry: dict[str, Callable[..., Any]] = {}

    def has(self, key: str) -> bool:
        """Whether ``key`` is registered."""
        return key in self.registry

    def register(
        self,
        name: str | list[str] | tuple[str, ...],
        func: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """Register a constructor under one or several names.

        Args:
            name: Name or names.
            func: The constructor; a decorator is returned when None.
            **kwargs: Arguments stored with it.

        Returns:
            The constructor itself, so that decorators stack.
        """
        if func is None:
            return functools.partial(self.register, name, **kwargs)
        for key in [name] if isinstance(name, str) else name:
            self.registry[key] = functools.partial(func, **kwargs)
        return func

    def get(self, name: str | None, default: Any = None) -> Any:
        """Look a constructor up.

        Args:
            name: Its name; None gives None.
            default: Returned for unknown names when not None.

        Raises:
            KeyError: If the name is unknown and there is no default; it says the nearest one.
        """
        if name is None:
            return None
        if name in self.registry:
            return self.registry[name]
        if default is not None:
            return default
        nearest = difflib.get_close_matches(name, self.registry, n=1)
        hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
        raise KeyError(f"`{name}` is not registered in <{self.name}>.{hint}")

    def try_get(self, name: str) -> Any:
        """The constructor, or None if unknown."""
        return self.registry.get(name)
