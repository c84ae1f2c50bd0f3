"""The messages that docs/troubleshooting.md explains are messages of the code."""

import ast
import re

import pytest

import check_docs

PAGE = check_docs.ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"  # what is formatted into a text


def quoted_messages(text):
    """The first cells of the tables' rows, without what follows the quotation."""
    own = text.split("## From other packages")[0]
    return re.findall(r"^\| `([^`]+)`", own, re.MULTILINE)


def rendered(node):
    """The text of a string in the code, with VALUE for what is formatted in; None of others."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d)?[sdrf]", VALUE, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
        return "".join(parts)
    return None


@pytest.fixture(scope="module")
def texts():
    """Every string of the package and of the scripts, docstrings left out."""
    found = set()
    for folder in ("diffnext", "scripts"):
        for path in (check_docs.ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            comments = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found |= {rendered(node) for node in ast.walk(tree) if id(node) not in comments}
    return found - {None}


def is_message(message, texts):
    """Whether a string of the code reads like it, with anything in the place of the dots."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    rarest = max(message.split("..."), key=len)
    has_words = len(re.sub(r"[\W\d_]", "", message)) > 8
    return has_words and any(rarest in text and pattern.search(text) for text in texts)


@pytest.mark.parametrize("message", quoted_messages(PAGE.read_text()))
def test_a_quoted_message_is_in_the_code(message, texts):
    assert is_message(message, texts)


def test_a_message_of_nobody_is_noticed(texts):
    assert not is_message("the moon is made of ... and ...", texts)
    assert not is_message("... must ...", texts)


def test_there_is_a_row_for_most_of_the_ways_a_run_can_end():
    assert len(quoted_messages(PAGE.read_text())) > 40


def test_the_message_of_codewithgpu_is_its_own():
    package = pytest.importorskip("codewithgpu")
    sources = "".join(
        path.read_text()
        for folder in package.__path__
        for path in sorted(check_docs.Path(folder).rglob("*.py"))
    )
    assert "is required but not installed" in sources
