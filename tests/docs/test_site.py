"""The documentation builds as a site."""

import re

import pytest

import check_docs

pytest.importorskip("mkdocs")
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import Abort  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(check_docs.ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    build(config)
    return folder


def test_every_page_is_in_the_site(site):
    for path in check_docs.page_paths():
        name = path.relative_to(check_docs.ROOT).with_suffix(".html").as_posix()
        page = site / ("index.html" if name == "README.html" else name)
        assert page.stat().st_size > 1000


def test_pictures_and_notebooks_are_in_the_site(site):
    html = (site / "index.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', html)
    assert "docs/shapes.png" in pictures
    assert all((site / name).is_file() for name in pictures)
    assert (site / "docs" / "notebooks" / "quick_start.ipynb").is_file()


def test_comments_for_the_tests_are_not_shown(site):
    text = re.sub(r"<!--.*?-->", "", (site / "TRAINING.html").read_text(), flags=re.DOTALL)
    assert "skip: needs" not in text and "setup: " not in text


def test_a_broken_link_stops_the_build(tmp_path):
    config_file = tmp_path / "mkdocs.yml"
    settings = (check_docs.ROOT / "mkdocs.yml").read_text().split("hooks:")[0]
    validation = (check_docs.ROOT / "mkdocs.yml").read_text().split("validation:")[1]
    config_file.write_text(f"{settings}validation:{validation}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](missing.md)")
    with pytest.raises(Abort):
        build(load_config(str(config_file), site_dir=str(tmp_path / "site")))
