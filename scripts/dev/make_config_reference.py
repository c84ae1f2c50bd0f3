"""Write docs/configuration.md: every key of a training configuration, from the code.

    python scripts/dev/make_config_reference.py          # writes the page
    python scripts/dev/make_config_reference.py --check  # exit code 1 if the page is out of date

Keys, types, defaults and meanings are those of diffnext/config/schema.py; the last columns are what
two files in configs/ set.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffnext.config.schema import KEEP, SchemaKey, TrainConfig, iterate_schema

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
SHIPPED = ("nova_d48w1024_sdxl1024", "nova_d48w1024_osp480")

HEAD = """\
# Configuration

<!-- Written by scripts/dev/make_config_reference.py: do not edit. -->
<!-- slow page -->

A training reads one YAML file and then the command line, whose `key=value` pairs take precedence:

<!-- setup: bash
python scripts/nova_tiny/make_shapes_dataset.py --num 8 --output my_dataset \\
  --vae assets/nova-tiny/vae
-->
<!-- replace: optimizer.params.lr=5e-5 => optimizer.params.lr=5e-5 training.dry_run=true -->
```bash
python scripts/train.py config=configs/nova_shapes_t2i.yaml \\
  pipeline.paths.pretrained_path=assets/nova-tiny train_dataloader.params.dataset=my_dataset \\
  experiment.output_dir=experiments/mine optimizer.params.lr=5e-5 '~wandb' +note=first
```

| Written | Means |
|---|---|
| `key=value` | the value is YAML: `1e-4`, `true`, `null`, `[1,2]`, `{t2i: 1, i2v: 2}` |
| `+key=value` | add a key that does not exist; only your own code reads it |
| `~key` | delete a key of the file, such as a whole section |
| `${other.key}` | the value of another key |
| `${eval:'1e-4*8'}` | arithmetic; `+ - * / // % **`, comparisons, `min max round int float` |

Everything is checked before anything is loaded, and all errors are printed at once: unknown keys,
values of the wrong type or outside their limits, and values that contradict each other, the base
folder or the records. Each is one line that begins with `error:` and names the key; the exit code
is 2. `python scripts/train.py --help` prints the keys below.

## What is trusted

A configuration names classes by dotted path (`target:`), and importing a class can run anything:
use only configurations you trust. Nothing else that a run reads (the base folder, checkpoints, the
dataset) can run code, unless `trust_remote_code=true` runs the Python files of the base folder.

The columns T2I and T2V show what `nova_d48w1024_sdxl1024.yaml` and `nova_d48w1024_osp480.yaml` in
`configs/` set. "The base folder's" is the default of keys that override its files; for these, null
is a value of its own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    args = parser.parse_args(argv)
    text = render()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    is_current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
    if not is_current:
        print(f"{PAGE} is out of date: python {Path(__file__).name}", file=sys.stderr)
    return 0 if is_current else 1


def render() -> str:
    """The whole page."""
    configs = [OmegaConf.load(ROOT / "configs" / f"{name}.yaml") for name in SHIPPED]
    parts = [HEAD]
    keys = list(iterate_schema(TrainConfig))
    plain = [item for item in keys if "." not in item.path]
    parts.append(_table("The run", "", [item for item in plain if item.section is None], configs))
    for section in keys:
        if section.section is None:
            continue
        members = [item for item in keys if _parent(item.path) == section.path]
        leaves = [item for item in members if item.section is None]
        if leaves:
            summary = inspect.cleandoc(section.section.__doc__ or "").splitlines()[0]
            parts.append(_table(f"`{section.path}`", summary, leaves, configs))
    return "\n".join(parts)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _table(title: str, summary: str, keys: Sequence[SchemaKey], configs: list[DictConfig]) -> str:
    lines = [f"## {title}", ""]
    lines += [summary, ""] if summary else []
    lines += ["| Key | Type | Default | Meaning | T2I | T2V |", "|---|---|---|---|---|---|"]
    for item in keys:
        default = "required" if item.required else _code(item.default)
        if item.default is KEEP:
            default = str(KEEP)
        shipped = [_shipped(config, item.path) for config in configs]
        cells = [f"`{item.path.rpartition('.')[2]}`", item.type_name, default, item.meaning]
        lines.append("| " + " | ".join(_escape(cell) for cell in [*cells, *shipped]) + " |")
    return "\n".join(lines) + "\n"


def _shipped(config: DictConfig, path: str) -> str:
    """What a file sets; the text itself where it refers to other keys."""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return ""
        node = node[name]
    return _code(node)


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
