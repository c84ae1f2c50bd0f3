"""Hooks of mkdocs: the site has the repository's own layout, so that links need no rewriting.

README.md becomes its first page; pages outside of docs/ and files that pages link to are part of
it. The order of the navigation is ORDER, then whatever else there is in docs/.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "README.md",
    "TRAINING.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.ipynb",
    "assets/**/README.md",
)
ORDER = (
    "README.md",
    "docs/index.md",
    "docs/inference.md",
    "docs/apps.md",
    "TRAINING.md",
    "docs/cache.md",
    "docs/data_format.md",
    "docs/configuration.md",
    "docs/scaling.md",
    "docs/reliability.md",
    "docs/performance.md",
    "docs/evaluation.md",
    "docs/faq.md",
    "docs/troubleshooting.md",
    "docs/migration.md",
    "docs/ARCHITECTURE.md",
    "CONTRIBUTING.md",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages that exist."""
    pages = [name for name in site_files() if name.endswith(".md")]
    first = [name for name in ORDER if name in pages]
    config.nav = [*first, *(name for name in pages if name not in first)]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Exchange the files of docs/ for those of the site, and keep the theme's."""
    own = [
        File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in site_files()
    ]
    others = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT)]
    return Files([*own, *others])


def site_files() -> list[str]:
    """Paths of all files of the site, within the repository."""
    found = [path for pattern in PARTS for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]
