"""Links of the documentation lead somewhere."""

import json
import re
import urllib.parse
from pathlib import Path

import pytest

import check_docs

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```[ \t]*$|<!--.*?-->|`[^`\n]*`", re.MULTILINE | re.DOTALL)
PAGES = [*check_docs.page_paths(), *sorted((check_docs.ROOT / "assets").rglob("README.md"))]
NOTEBOOKS = sorted((check_docs.ROOT / "docs").rglob("*.ipynb"))


def links(text):
    """Targets of all links and pictures outside of code."""
    return LINK.findall(CODE.sub("", text))


def anchors(path):
    """Names of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```[ \t]*$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = sum(
            anchor == name or re.fullmatch(rf"{re.escape(name)}-\d+", anchor) is not None
            for anchor in found
        )
        found.add(f"{name}-{count}" if count else name)
    return found


def problem(link, page):
    """What is wrong with a link of a page; None if nothing is."""
    if re.match(r"[a-z]+:", link):
        parts = urllib.parse.urlsplit(link)
        is_good = parts.scheme == "https" and "." in parts.netloc and parts.netloc.isascii()
        return None if is_good else "is no https address"
    name, _, anchor = link.partition("#")
    target = (page.parent / urllib.parse.unquote(name)).resolve() if name else page
    if not target.is_relative_to(check_docs.ROOT):
        return "leads out of the repository"
    if not target.is_file():
        return "is no file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"has no such heading; there are {sorted(anchors(target))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(check_docs.ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    problems = {link: problem(link, page) for link in links(page.read_text())}
    assert {link: text for link, text in problems.items() if text} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    problems = {link: problem(link, path) for link in links(text)}
    assert {link: text for link, text in problems.items() if text} == {}


def test_every_page_can_be_reached_from_the_first():
    start = check_docs.ROOT / "README.md"
    reached, waiting = {start}, [start]
    while waiting:
        page = waiting.pop()
        for link in links(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert set(check_docs.page_paths()) - reached == set()


@pytest.mark.parametrize(
    "link, text",
    [
        ("missing.md", "is no file"),
        ("#no-such-heading", "has no such heading"),
        ("../../outside.md", "leads out"),
        ("http://example.org", "is no https address"),
        ("https://nowhere", "is no https address"),
    ],
)
def test_a_broken_link_is_noticed(link, text):
    assert text in problem(link, check_docs.ROOT / "README.md")


def test_links_in_code_and_comments_are_none():
    text = "[a](b.md) `[c](d.md)` <!-- [e](f.md) -->\n```\n[g](h.md)\n```\n![i [j]](k.png)"
    assert links(text) == ["b.md", "k.png"]


def test_headings_become_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three!\n\n```\n# no heading\n```\n## Again\n## Again\n")
    assert anchors(Path(page)) == {"one-two-three", "again", "again-1"}
