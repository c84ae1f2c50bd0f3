"""The documentation builds as a site."""

import ast
import re
from html.parser import HTMLParser

import pytest

import check_docs

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
import mkdocs.config  # noqa: E402
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.exceptions import Abort  # noqa: E402

ROOT = check_docs.ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    build(config)
    return folder


class Tags(HTMLParser):
    """The names that a page can be linked at, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.names, self.loaded = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names.add(values.get("id"))
        self.loaded.add(values.get("src"))
        if tag == "link":
            self.loaded.add(values.get("href"))


def test_every_page_is_in_the_site(site):
    for path in check_docs.page_paths():
        name = path.relative_to(ROOT).with_suffix(".html").as_posix()
        page = site / ("index.html" if name == "README.html" else name)
        assert page.stat().st_size > 1000


def test_pictures_and_notebooks_are_in_the_site(site):
    html = (site / "index.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', html)
    assert pictures and all((site / name).is_file() for name in pictures)
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        place = site / "docs" / "notebooks" / path.name
        assert place.is_file() and "<code>" in place.with_suffix(".html").read_text()


def test_what_pages_load_is_in_the_site_and_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        names = [name for name in Tags(path).loaded - {None} if not name.startswith("data:")]
        if path.name == "404.html":  # from anywhere, with links from the root
            names = [f"{site}{name}" for name in names]
        assert any(name.endswith(".css") for name in names)
        missing = [name for name in names if not (path.parent / name.partition("?")[0]).exists()]
        assert not missing, path


def test_comments_for_the_tests_are_not_shown(site):
    text = re.sub(r"<!--.*?-->", "", (site / "TRAINING.html").read_text(), flags=re.DOTALL)
    assert "skip: needs" not in text and "setup: " not in text


def public_names(path):
    """What a module defines for others: what `__all__` lists, or what has no underscore."""
    body = ast.parse(path.read_text()).body
    imported = {
        alias.asname or alias.name
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    listed = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    names = listed[0] if listed else (name for name in defined if not name.startswith("_"))
    return set(names) - imported


def test_every_public_name_is_in_the_reference(site):
    documented = set().union(*(Tags(path).names for path in (site / "docs" / "api").glob("*")))
    public = {
        ".".join([*path.relative_to(ROOT).with_suffix("").parts, name])
        for path in sorted((ROOT / "diffnext").rglob("[!_]*.py"))
        if "cli" not in path.parts
        for name in public_names(path)
    }
    assert len(public) > 300
    assert public - documented == set()


def test_a_broken_link_stops_the_build(tmp_path):
    config_file = tmp_path / "mkdocs.yml"
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings.split("validation:")[1].split("nav:\n  -")[0]
    config_file.write_text(f"site_name: a\nstrict: true\nvalidation:{validation}")
    (tmp_path / "docs").mkdir()
    for text in ("[nowhere](missing.md)", "[nowhere](#missing)"):
        (tmp_path / "docs" / "index.md").write_text(text)
        with pytest.raises(Abort):
            build(mkdocs.config.load_config(str(config_file), site_dir=str(tmp_path / "site")))
