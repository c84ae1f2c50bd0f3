"""Hooks of mkdocs: the site has the repository's layout, so links work as they are.

README.md becomes its first page. The pages of packages, from their docstrings, and of notebooks
are made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("*.md", "LICENSE", "docs/**/*.*", "assets/**/README.md")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by the pages of the site, and keep the theme's files."""
    docs = ROOT / "docs"  # the theme's files may be below ROOT, in a virtual environment
    paths = [path for pattern in PARTS for path in sorted(ROOT.glob(pattern))]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    notebooks = [name for name in names if name.endswith(".ipynb")]
    pages = {name.replace(".ipynb", ".md"): notebook_page(name) for name in notebooks}
    pages |= {f"docs/api/{name}.md": package_page(name) for name in packages()}
    return Files(
        [
            *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names),
            *(File.generated(config, name, content=text) for name, text in pages.items()),
            *(file for file in files if not Path(file.abs_src_path or "").is_relative_to(docs)),
        ]
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to notebooks lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def on_page_content(html: str, **_: Any) -> str:
    """Show names in docstrings without their Sphinx roles, such as :class:."""
    return re.sub(r":(class|data|func|meth|mod):<code>~?", "<code>", html)


def packages() -> list[str]:
    """Packages whose modules are documented; the commands have `--help`."""
    folders = (path.parent for path in sorted(ROOT.glob("diffnext/**/__init__.py")))
    names = (".".join(folder.relative_to(ROOT).parts) for folder in folders)
    return [name for name in names if name != "diffnext.cli" and modules(name)]


def modules(package: str) -> list[str]:
    """Modules of a package, without its sub-packages."""
    folder = ROOT.joinpath(*package.split("."))
    return [path.stem for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]


def package_page(package: str) -> str:
    """Docstrings of the modules of a package; guides come first in a search."""
    blocks = [f"::: {package}.{module}\n" for module in modules(package)]
    return "\n".join(["---\nsearch: {boost: 0.2}\n---", f"# {package}\n", *blocks])


def notebook_page(name: str) -> str:
    """A notebook as Markdown, with the outputs that it has."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    parts = [part for cell in notebook.cells for part in cell_parts(cell)]
    download = f'<a href="{Path(name).name}" download>Download this notebook</a>'
    return "\n\n".join([parts[0], download, *parts[1:]])


def cell_parts(cell: nbformat.NotebookNode) -> Iterator[str]:
    """A cell, and what it printed or showed."""
    if cell.cell_type == "markdown":
        yield cell.source
        return
    language = "bash" if cell.source.startswith("%%bash") else "python"
    yield f"```{language}\n{cell.source}\n```"
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![](data:image/png;base64,{data['image/png'].strip()})"
        else:
            yield f"```text\n{output.get('text') or data.get('text/plain', '')}\n```"
