"""Write the tables of docs/configuration.md: every key of a training configuration, from the code.

    python scripts/dev/make_config_reference.py          # writes the page
    python scripts/dev/make_config_reference.py --check  # exit code 1 if the page is out of date

Keys, types, defaults and meanings come from diffnext/config/schema.py; the last columns are what
two files in configs/ set. The text above the mark in the page is written by hand.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffnext.cli.parsing import command_parser
from diffnext.config.schema import KEEP, SchemaKey, TrainConfig, iterate_schema, look_up

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
SHIPPED = ("nova_d48w1024_sdxl1024", "nova_d48w1024_osp480")

MARK = "<!-- Below: written by scripts/dev/make_config_reference.py, from the code. -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = command_parser("make_config_reference.py", __doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    args = parser.parse_args(argv)
    text = render()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    is_current = PAGE.read_text(encoding="utf-8") == text
    if not is_current:
        print(f"{PAGE} is out of date: python {Path(__file__).name}", file=sys.stderr)
    return 0 if is_current else 1


def render() -> str:
    """The whole page: its own text up to the mark, and the tables."""
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    configs = [OmegaConf.load(ROOT / "configs" / f"{name}.yaml") for name in SHIPPED]
    keys = list(iterate_schema(TrainConfig))
    leaves: dict[str, list[SchemaKey]] = {}
    for item in keys:
        if item.section is None:
            leaves.setdefault(item.path.rpartition(".")[0], []).append(item)
    parts = [text, f"\n{MARK}\n", _table("The run", "", leaves[""], configs)]
    for item in keys:
        if item.section is not None and item.path in leaves:
            summary = inspect.cleandoc(item.section.__doc__ or "").splitlines()[0]
            parts.append(_table(f"`{item.path}`", summary, leaves[item.path], configs))
    return "\n".join(parts)


def _table(title: str, summary: str, keys: Sequence[SchemaKey], configs: Sequence[Any]) -> str:
    lines = [f"## {title}", ""]
    lines += [summary, ""] if summary else []
    lines += ["| Key | Meaning | Type | Default | T2I | T2V |", "|---|---|---|---|---|---|"]
    for item in keys:
        default = "required" if item.required else _code(item.default)
        if item.default is KEEP:
            default = str(KEEP)
        shipped = [_shipped(config, item.path) for config in configs]
        cells = [f"`{item.path.rpartition('.')[2]}`", item.meaning, item.type_name, default]
        lines.append("| " + " | ".join(_escape(cell) for cell in [*cells, *shipped]) + " |")
    return "\n".join(lines) + "\n"


def _shipped(config: Any, path: str) -> str:
    """What a file sets; the text itself where it refers to other keys."""
    is_set, value = look_up(OmegaConf.to_container(config, resolve=False), path)
    return _code(value) if is_set else ""


def _code(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name}: {_plain(item)}" for name, item in value.items())
        return f"`{{{inner}}}`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A value as one would type it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return '""' if value == "" else str(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
