"""Reading a configuration: YAML and command line become one checked tree of dataclasses.

:func:`get_config` merges, :func:`parse` makes the tree, which never changes. All errors are found
before one is raised.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import MarkedYAMLError, YAMLError

from diffnext.config.arithmetic import evaluate_arithmetic
from diffnext.config.schema import TrainConfig, iterate_schema, look_up
from diffnext.config.targets import ConfigError, target_parameters, wrong_parameters
from diffnext.utils.messages import did_you_mean, explain, one_line

__all__ = [
    "Draft",
    "OmegaConfEncoder",
    "config_to_yaml",
    "flatten_omega_conf",
    "get_config",
    "parse",
    "parse_for_rank",
    "read_config",
    "save_config",
]

T = TypeVar("T")

# Of OmegaConf, YAML and json.dumps; tags of YAML, as in "!!bool maybe", raise the others.
_UNREADABLE = (
    OmegaConfBaseException,
    YAMLError,
    OSError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
)


class OmegaConfEncoder(json.JSONEncoder):
    """JSON encoder that writes OmegaConf containers as plain, resolved lists and dicts."""

    def default(self, o: Any) -> Any:
        """Return a JSON value for ``o``."""
        if OmegaConf.is_config(o):
            return OmegaConf.to_container(o, resolve=True)
        return super().default(o)


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the keys of a configuration were written.

    Attributes:
        file: The YAML file.
        command_line: Dotted keys given on the command line.
        forced: Those given with a ``+``: they and the keys below them may be unknown. None if that
            was not recorded: then every key may be unknown.
    """

    file: str = "the configuration"
    command_line: frozenset[str] = frozenset()
    forced: frozenset[str] | None = None

    def place(self, path: str) -> str:
        """Where a key was written, in words."""
        return "on the command line" if path in self.command_line else f"in {self.file}"

    def is_forced(self, path: str) -> bool:
        """Whether a key was added with ``+``."""
        keys = (path,) if self.forced is None else self.forced
        return any(path == key or path.startswith(f"{key}.") for key in keys)


# Merging


def get_config(argv: Sequence[str] | None = None) -> DictConfig:
    """Merge a YAML file with command-line overrides and check keys and values.

    Args:
        argv: Items with YAML values, applied in order. ``key.path=value`` overrides the file,
            ``+key.path=value`` adds a key that is not in the schema, ``~key.path`` deletes a key.
            One of them is ``config=<file>``. Default: the command line of the process.

    Returns:
        The file with the overrides; the key ``config`` stays in it.

    Raises:
        ConfigError: Naming every key that is unknown or has a wrong value. Required keys may be
            missing, but not null.
    """
    config, origins = read_config(argv)
    draft = Draft(config, TrainConfig, origins)
    problems = [line for line in draft.problems if line not in draft.missing]
    if problems:
        raise ConfigError(*problems)
    return config


def read_config(argv: Sequence[str] | None = None) -> tuple[DictConfig, Origins]:
    """Merge a file and a command line, see :func:`get_config`, and tell where each key is from.

    Raises:
        ConfigError: If a file or an item cannot be read.
    """
    OmegaConf.register_resolver("eval", evaluate_arithmetic, replace=True)
    items = list(sys.argv[1:] if argv is None else argv)
    overrides = _plain(_parse_overrides(items))
    config = _apply_items(_load_yaml(overrides.get("config")), items)
    origins = Origins(
        file=str(overrides["config"]),
        command_line=frozenset(_all_paths(overrides)),
        forced=frozenset(_key_of(item[1:]) for item in items if item.startswith("+")),
    )
    return config, origins


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
        if not item.startswith("~") and ("=" not in item or not _key_of(item).strip("+.")):
            hint = f"; did you mean config={item}?" if item.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"arguments are written key=value, got {item!r}{hint}")
    config = OmegaConf.create()
    for item in items:
        if item.startswith("~"):
            continue
        try:
            config.merge_with_dotlist([item.removeprefix("+")])
            json.dumps(_plain(config), default=str)  # what the tree is made from
        except _UNREADABLE as error:
            raise ConfigError(f"cannot parse {one_line(item)}: {_reason(error)}") from error
    return config


def _apply_items(file_config: DictConfig, items: Sequence[str]) -> DictConfig:
    """Override, add and delete keys in the order of the command line."""
    config = file_config.copy()
    for item in items:
        if item.startswith("~"):
            _delete_key(config, item[1:])
            continue
        try:
            config.merge_with(_parse_overrides([item]))
        except _UNREADABLE as error:
            raise ConfigError(f"cannot apply {item!r} to the file: {_reason(error)}") from error
    return config


def _delete_key(config: DictConfig, path: str) -> None:
    existing = set(_all_paths(_plain(config)))
    if path not in existing:
        raise ConfigError(f"~{path}: there is no such key{_nearest(path, existing)}")
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    del config[name]


def _load_yaml(path: Any) -> DictConfig:
    if path is None:
        raise ConfigError("config is required: add config=<file.yaml> to the command line")
    if not os.path.isfile(str(path)):
        raise ConfigError(f"config={path}: no such file{did_you_mean(Path(path))}")
    try:
        config = OmegaConf.load(str(path))
        json.dumps(_plain(config), default=str)  # what the tree is made from
    except _UNREADABLE as error:
        raise ConfigError(f"config={path} is not a readable YAML file: {_reason(error)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"config={path} must hold key: value pairs at its top level")
    return config


def _reason(error: Exception) -> str:
    """The message of YAML or OmegaConf in one line."""
    if isinstance(error, RecursionError):
        return "it refers to itself, or is nested too deeply"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    text = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else str(error)
    return " ".join(text.rpartition("raised while resolving interpolation: ")[2].split())


# Checking


def parse(config: Any, schema: type[T], origins: Origins | None = None) -> T:
    """Make a configuration a tree of frozen dataclasses, defaults filled in.

    Args:
        config: A merged configuration, or a tree, which is returned as it is.
        schema: Dataclass of its keys.
        origins: Where its keys were written, for the messages.

    Raises:
        ConfigError: Naming every key that is unknown, missing, or has a wrong value.
    """
    if isinstance(config, schema):
        return config
    draft = Draft(config, schema, origins or Origins())
    if draft.problems:
        raise ConfigError(*draft.problems)
    return draft.build()


def parse_for_rank(config: DictConfig, rank: int) -> TrainConfig:
    """The tree of one process: its seed is ``training.seed + rank``, also where keys refer to it.

    Raises:
        ConfigError: As for :func:`parse`.
    """
    seed = parse(config, TrainConfig).training.seed + rank
    return parse(OmegaConf.merge(config, {"training": {"seed": seed}}), TrainConfig)


class Draft(Generic[T]):
    """A configuration that is being checked.

    Args:
        config: A merged configuration.
        schema: Dataclass of its keys.
        origins: Where its keys were written.

    Attributes:
        problems: A line for each wrong key.
        wrong: The wrong keys.
        unsound: The wrong keys and those that refer to them.
        missing: The problems that say that a required key is missing.
    """

    def __init__(self, config: DictConfig, schema: type[T], origins: Origins) -> None:
        self.schema = schema
        self.origins = origins
        self.keys = list(iterate_schema(schema))
        self._sections = {item.path for item in self.keys if item.section is not None}
        self.tree, self._unresolved = self._resolve(config)
        self.targets = dict(self._find_targets())
        self.known = {"config", *(item.path for item in self.keys), *self._arguments()}
        self.missing: list[str] = []
        lines = {**self._unresolved, **dict(self._wrong_values()), **dict(self._wrong_arguments())}
        self.unsound = set(lines)
        texts = {path: str(look_up(_plain(config), path)[1]) for path in lines}
        # A value that only refers to a wrong one is not worth a line.
        self.wrong = {path for path in lines if not _is_consequence(path, texts)}
        self.problems = [line for path, line in lines.items() if path in self.wrong]

    def build(self) -> T:
        """Make the tree.

        Raises:
            ValidationError: If a value is wrong.
        """
        # As JSON, which has lists for tuples.
        text = json.dumps(self._known_part(self.tree), default=str)
        schema: type = self.schema
        return _adapter_of(schema).validate_json(text)

    def sound_part(self, needed: Iterable[str], stand_ins: Mapping[str, Any]) -> T | None:
        """The tree with defaults instead of wrong values.

        Args:
            needed: Sections that must be right.
            stand_ins: Values for required keys that are wrong or missing.

        Returns:
            The tree; None if it cannot be made, or a key of these sections is wrong or missing.
        """
        if any(path.partition(".")[0] in needed for path in self.wrong):
            return None
        tree = _without(self.tree, self.unsound)
        for path in self.unsound & stand_ins.keys():
            _set(tree, path, stand_ins[path])
        draft = Draft(OmegaConf.create(tree), self.schema, self.origins)
        return None if draft.problems else draft.build()

    def _known_part(self, tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The tree without keys that may be unknown."""
        part = {}
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict) and path in self._sections:
                part[name] = self._known_part(value, f"{path}.")
            elif path in self.known or not all(
                self.origins.is_forced(leaf) for leaf, _ in _leaves(value, path)
            ):
                part[name] = value
        return part

    def _resolve(self, config: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
        """Plain containers with interpolations replaced by values; and lines for those that fail.

        An interpolation may refer to a key that is left to its default. A section that is null
        counts as left out, unless null switches it off. So does ???.
        """
        tree = _plain(config)
        tree = _without(tree, {path for path, value in _leaves(tree) if value == "???"})
        for item in self.keys:
            above, _, name = item.path.rpartition(".")
            parent = look_up(tree, above)[1] if above else tree
            is_section = item.section is not None or item.is_open
            if not isinstance(parent, dict):
                continue
            if is_section and not item.is_optional and parent.get(name) is None:
                parent[name] = {}
            elif isinstance(item.default, str | int | float | None):
                parent.setdefault(name, item.default)
        merged = OmegaConf.create(tree)
        unresolved = {}
        for path, value in list(_leaves(tree)):
            if "${" not in str(value):
                continue
            try:
                _set(tree, path, _plain(OmegaConf.select(merged, path), resolve=True))
            except (OmegaConfBaseException, ConfigError, RecursionError) as error:
                unresolved[path] = f"{path} does not resolve: {_reason(error)}"
        return tree, unresolved

    def _find_targets(self) -> Iterator[tuple[str, str]]:
        """The targets of sections whose ``params`` are the arguments of that target."""
        for item in self.keys:
            section, _, name = item.path.rpartition(".")
            if item.is_open and name == "params":
                default = next(i.default for i in self.keys if i.path == f"{section}.target")
                target = look_up(self.tree, f"{section}.target")[1]
                yield section, default if target is None else target

    def _arguments(self) -> Iterator[str]:
        for section, target in self.targets.items():
            yield from (f"{section}.params.{name}" for name in target_parameters(target) or ())

    def _wrong_values(self) -> Iterator[tuple[str, str]]:
        wrong: dict[str, list[Any]] = {}
        try:
            self.build()
        except ValidationError as error:
            for part in error.errors():
                wrong.setdefault(_path_of(part, self.known), []).append(part)
        for path, parts in wrong.items():
            value = look_up(self.tree, path)[1]
            depth = path.count(".") + 1
            if path in self._unresolved:
                continue
            if parts[0]["type"] == "unexpected_keyword_argument":
                for leaf, _ in _leaves(value, path):
                    yield leaf, unknown_key(leaf, self.known, self.origins)
            elif parts[0]["type"] == "missing" and len(parts[0]["loc"]) == depth:
                self.missing.append(f"{path} is required: add {path}=... to the command line")
                yield path, self.missing[-1]
            else:
                yield path, self._wrong(path, explain(parts, depth), value)

    def _wrong_arguments(self) -> Iterator[tuple[str, str]]:
        """Compare ``params`` with the target beside them."""
        for section, target in self.targets.items():
            params = look_up(self.tree, f"{section}.params")[1]
            taken = target_parameters(target)
            if taken is None or not isinstance(params, dict):
                continue
            paths = {name: f"{section}.params.{name}" for name in params}
            for name, path in paths.items():
                if name not in taken and not self.origins.is_forced(path):
                    yield path, unknown_key(path, self.known, self.origins, target)
            for name, rule in wrong_parameters(target, params):
                if paths[name] not in self._unresolved:
                    yield paths[name], self._wrong(paths[name], rule, params[name])

    def _wrong(self, path: str, rule: str, value: Any) -> str:
        if not path:
            return rule  # about the whole tree, which names keys itself
        colon = "" if rule.startswith(("must ", "has ")) else ":"
        is_said = isinstance(value, str) and _show(value) in rule
        got = "" if is_said else f", got {_show(value)}"
        return f"{path}{colon} {rule}{got}, {self.origins.place(path)}"


@functools.cache
def _adapter_of(schema: type) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _is_consequence(path: str, texts: Mapping[str, str]) -> bool:
    """Whether a wrong value refers to another one, but not in a circle."""
    reached: set[str] = set()
    todo = [path]
    while todo:
        text = texts[todo.pop()]
        found = {name for name in texts if f"${{{name}}}" in text or f"${{{name}." in text}
        todo += found - reached
        reached |= found
    return bool(reached) and path not in reached


def _without(tree: Mapping[str, Any], paths: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without(value, paths, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in tree.items()
        if f"{prefix}{name}" not in paths
    }


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _path_of(part: Mapping[str, Any], known: set[str]) -> str:
    """The dotted key that an error of pydantic is about, without the members of unions."""
    path = ""
    for name in part["loc"]:
        longer = f"{path}.{name}".lstrip(".")
        is_last_unknown = part["type"] == "unexpected_keyword_argument"
        if not isinstance(name, str) or (longer not in known and not is_last_unknown):
            break
        path = longer
    return path


def unknown_key(path: str, known: set[str], origins: Origins, target: str | None = None) -> str:
    """The message about a key that nothing reads, with the key that may have been meant."""
    way_out = f"write +{path}=... to add a new key"
    if path not in origins.command_line:
        way_out = f"write +{path}=... to keep it, ~{path} to drop it"
    reason = f", which {target} does not take" if target else ""
    nearest = _nearest(path, known)
    return f"unknown key {path!r} {origins.place(path)}{reason}{nearest} ({way_out})"


def _nearest(path: str, known: Iterable[str]) -> str:
    """Suggest the known key nearest to an unknown one; empty if none is near."""
    names = sorted(known)
    # Else the right key in a wrong section.
    same_leaf = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]]
    close = difflib.get_close_matches(path, names, cutoff=0.8)
    close = close or difflib.get_close_matches(path, same_leaf, cutoff=0.0)
    return f": did you mean {close[0]!r}?" if close else ""


def _show(value: Any) -> str:
    """Write a value as in YAML, if it is short."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else one_line(value)


# Writing


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


def flatten_omega_conf(cfg: DictConfig | ListConfig, resolve: bool = True) -> list[tuple[str, Any]]:
    """List the leaves of a configuration.

    Args:
        cfg: A configuration; list elements are named by their index.
        resolve: Replace interpolations by their values.

    Returns:
        Pairs of dotted key and value.
    """
    return list(_leaves(_plain(cfg, resolve=resolve), lists=True))


def _plain(config: Any, resolve: bool = False) -> Any:
    """Containers of OmegaConf as dicts and lists; anything else as it is."""
    is_config = OmegaConf.is_config(config)
    return OmegaConf.to_container(config, resolve=resolve) if is_config else config


def _leaves(tree: Any, prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of the leaves of a tree of dicts, and of lists if asked to."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict) and tree:
        children = tree.items()
    elif isinstance(tree, list) and tree and lists:
        children = enumerate(tree)
    else:
        children = ()
        if prefix:
            yield prefix, tree
    for name, value in children:
        yield from _leaves(value, f"{prefix}.{name}".lstrip("."), lists)


def _all_paths(tree: Any) -> Iterator[str]:
    """Dotted paths of all nodes of a tree of dicts, inner ones included."""
    for path, _ in _leaves(tree):
        yield from itertools.accumulate(path.split("."), lambda a, b: f"{a}.{b}")
