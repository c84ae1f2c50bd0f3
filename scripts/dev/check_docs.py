"""Run the code blocks of the documentation, page by page.

    python scripts/dev/check_docs.py                      # every page that is not slow
    python scripts/dev/check_docs.py docs/inference.md

The pages are *.md and docs/**/*.md. Blocks marked python, bash and yaml are run in order, in one
folder that looks like the repository; the Python blocks of a page share their names. YAML is
parsed and, where it sets keys of a training, checked against them. HTML comments, which no reader
sees, say what else is needed:

    <!-- skip: needs a GPU -->              the next block is not run; or "needs a download"
    <!-- replace: old => new -->            old, which must occur in the next block, is run as new
    <!-- setup: python                      other code, run at this place (or "setup: bash")
    ...
    -->
    <!-- slow page -->                      the page runs only if it is named

Everywhere, tiny models replace the released ones and "/path/to/..." (STAND_INS), the CPU replaces
CUDA, and float32 half precision.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffnext.cli.parsing import command_parser
from diffnext.config.schema import TrainConfig, iterate_schema

ROOT = Path(__file__).resolve().parents[2]
# What blocks find in their folder; not what someone's own runs have left in the checkout.
SOURCES = (
    *("accelerate_configs", "assets", "configs", "diffnext", "docs", "scripts", "tests"),
    *("Makefile", "README.md", "TRAINING.md", "pyproject.toml"),
)
SKIP_REASONS = ("needs a GPU", "needs a download")
RUNNABLE = ("python", "bash", "yaml")
NOT_CODE = ("", "text", "bibtex", "json", "jsonl", "csv")

# Folders that pages name -> the config of the tiny model that a test uses instead.
STAND_INS = {
    "BAAI/nova-d48w1024-osp480": "configs/nova_shapes_t2v.yaml",
    "/path/to/nova-d48w1024-sdxl1024": "configs/nova_tiny_t2i.yaml",
    "/path/to/nova-d48w1024-osp480": "configs/nova_tiny_t2v.yaml",
    "/path/to/your-class-model": "configs/nova_shapes_c2i.yaml",
}
REPLACED = {
    "BAAI/nova-d48w1024-sdxl1024": "assets/nova-tiny",
    '"cuda"': '"cpu"',
    "torch.float16": "torch.float32",
}

_TOKENS = re.compile(
    r"^<!--(?P<comment>.*?)-->[ \t]*$"
    r"|^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
_DIRECTIVE = re.compile(r"\s*(?P<name>skip|replace|setup|slow page)\b:?(?P<rest>.*)", re.DOTALL)


class DocsError(Exception):
    """A page that cannot be checked, or a block that failed; the message says where and why."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: Line of the page on which the code starts.
        language: What runs it.
        code: As the page shows it.
        replacements: (old, new) pairs to be applied before it is run.
        skip: Why it is not run; None if it is.
        is_hidden: Whether it is in a comment.
    """

    line: int
    language: str
    code: str
    replacements: tuple[tuple[str, str], ...] = ()
    skip: str | None = None
    is_hidden: bool = False


@dataclass(frozen=True)
class Page:
    """A page and its blocks, in order."""

    path: Path
    is_slow: bool
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """Path within the repository."""
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else "page"

    def counts(self) -> Counter[str]:
        """Visible blocks that run, and those skipped by reason."""
        return Counter(block.skip or "run" for block in self.blocks if not block.is_hidden)


def page_paths() -> list[Path]:
    """All pages of the documentation, sorted."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def read_page(path: Path) -> Page:
    """Collect the blocks of a page.

    Raises:
        DocsError: If a comment cannot be understood, or does not belong to a block.
    """
    text = path.read_text(encoding="utf-8")
    reader = _Reader(path.name)
    for match in _TOKENS.finditer(text):
        reader.line = text.count("\n", 0, match.start()) + 1
        if match["comment"] is None:
            reader.read_fence(match["language"].strip(), match["code"])
        elif directive := _DIRECTIVE.fullmatch(match["comment"]):
            reader.read_comment(directive["name"], directive["rest"])
    reader.check(not reader.is_pending, "a comment at the end belongs to no block")
    return Page(path, reader.is_slow, tuple(reader.blocks))


@dataclass
class _Reader:
    """What was read of a page, and what comments said about the next block."""

    name: str
    line: int = 0
    is_slow: bool = False
    blocks: list[Block] = field(default_factory=list)
    skip: str | None = None
    replacements: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_pending(self) -> bool:
        return bool(self.skip or self.replacements)

    def check(self, condition: bool, message: str) -> None:
        if not condition:
            raise DocsError(f"{self.name}:{self.line}: {message}")

    def read_comment(self, directive: str, rest: str) -> None:
        if directive == "slow page":
            self.is_slow = True
        elif directive == "skip":
            self.skip = rest.strip()
            self.check(self.skip in SKIP_REASONS, f"{self.skip!r} is none of {SKIP_REASONS}")
        elif directive == "replace":
            pairs = [line.split("=>") for line in rest.strip().splitlines()]
            is_sound = bool(pairs) and all(len(pair) == 2 for pair in pairs)
            self.check(is_sound, "each line of a replacement must be 'old => new'")
            self.replacements += [(old.strip(), new.strip()) for old, new in pairs]
        else:
            language, _, code = rest.lstrip(" ").partition("\n")
            message = f"setup must name one of {RUNNABLE}, got {language!r}"
            self.check(language in RUNNABLE, message)
            self.blocks.append(Block(self.line + 1, language, code, is_hidden=True))

    def read_fence(self, language: str, code: str) -> None:
        is_known = language in RUNNABLE + NOT_CODE
        self.check(is_known, f"a block of {language!r} is neither code nor text")
        if language not in RUNNABLE:
            self.check(not self.is_pending, "a comment speaks of a block that is not run")
            return
        for old, _ in self.replacements:
            self.check(old in code, f"{old!r}, which is to be replaced, is not in the block")
        block = Block(self.line + 1, language, code, tuple(self.replacements), self.skip)
        self.blocks.append(block)
        self.skip, self.replacements = None, []


class StandIns:
    """Tiny models in the place of released ones, made when a page first speaks of them.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def apply(self, block: Block) -> str:
        """The code of a block as it is run."""
        code = block.code
        for old, new in block.replacements:
            code = code.replace(old, new)
        for name, config in STAND_INS.items():
            if name in code:
                code = code.replace(name, str(self._make(name, config)))
        for old, new in REPLACED.items():
            code = code.replace(old, new)
        return code

    def _make(self, name: str, config: str) -> Path:
        place = self.folder / name.strip("/").replace("/", "-")
        if not place.exists():
            from diffnext.cli import init  # imports torch, which reading pages does not need

            options = ["--config", str(ROOT / config), "--output", str(place), "--tiny"]
            with contextlib.redirect_stdout(io.StringIO()):
                if init.main(options):
                    raise DocsError(f"{config} cannot be made into a model for {name}")
        return place


def environment() -> dict[str, str]:
    """Of the processes that run blocks: this package and this interpreter, nothing from outside."""
    binaries = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_page(page: Page, folder: Path, stand_ins: StandIns) -> None:
    """Run the blocks of a page that are not skipped, in an own process.

    Args:
        page: What to run.
        folder: An empty folder to run in.
        stand_ins: Models in the place of released ones.

    Raises:
        DocsError: With page, line and output of the block that failed.
    """
    for name in SOURCES:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    blocks = [replace(b, code=stand_ins.apply(b)) for b in page.blocks if b.skip is None]
    if not blocks:
        return
    log = folder / "output.log"
    process = _forking().Process(target=_run_blocks, args=(page.name, blocks, folder, log))
    process.start()
    process.join()
    if process.exitcode:
        output = log.read_text(errors="replace")[-6000:]
        raise DocsError(output or f"{page.name}: the process ended with {process.exitcode}")


@functools.cache
def _forking() -> Any:
    """Processes that start with the large libraries imported, which is most of a page's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.modeling_utils", "diffusers.pipelines.pipeline_utils"]
    )
    return context


def _run_blocks(page_name: str, blocks: Sequence[Block], folder: Path, log: Path) -> None:
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.update(environment())
    os.chdir(folder)
    sys.path.insert(0, "")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        try:
            _run_code(block, page_name, names)
        except (Exception, SystemExit):
            print(f"{page_name}:{block.line}: this {block.language} block failed")
            print(traceback.format_exc(), flush=True)
            sys.exit(1)


def _run_code(block: Block, page_name: str, names: dict[str, Any]) -> None:
    if block.language == "python":  # empty lines first: tracebacks name the page's line
        exec(compile("\n" * (block.line - 1) + block.code, page_name, "exec"), names)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
    else:
        check_yaml(block.code)


def check_yaml(text: str) -> None:
    """Parse YAML; sections of a training configuration must have known keys.

    Raises:
        DocsError: Naming a key that no training has.
    """
    config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    schema = {item.path: item for item in iterate_schema(TrainConfig)}
    if isinstance(config, dict) and set(config) <= {path for path in schema if "." not in path}:
        _check_section(config, "", schema)


def _check_section(section: dict[Any, Any], prefix: str, schema: dict[str, Any]) -> None:
    for name, value in section.items():
        path = prefix + name
        if path not in schema:
            raise DocsError(f"unknown key {path!r}")
        if isinstance(value, dict) and not schema[path].is_open:
            _check_section(value, f"{path}.", schema)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = command_parser("check_docs.py", __doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="pages to run (all but the slow ones)")
    args = parser.parse_args(argv)
    pages = [read_page(path.resolve()) for path in args.pages or page_paths()]
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        stand_ins = StandIns(Path(scratch) / "models")
        for page in pages:
            if page.is_slow and not args.pages:
                continue
            folder = Path(scratch) / page.name.replace("/", "-")
            folder.mkdir()
            outcome = "passed"
            try:
                run_page(page, folder, stand_ins)
            except DocsError as error:
                failures += 1
                outcome = f"FAILED\n{error}"
            print(f"{page.name}: {dict(page.counts())}: {outcome}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
