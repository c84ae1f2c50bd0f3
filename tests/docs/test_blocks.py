"""Every block of code of the documentation runs, or says why it cannot."""

import pytest

import check_docs
from check_docs import DocsError, StandIns, read_page, run_page

PAGES = [read_page(path) for path in check_docs.page_paths()]


def parametrised_pages():
    """Pages with something to run; those that say so are slow."""
    for page in PAGES:
        if page.counts()["run"]:
            marks = [pytest.mark.slow] if page.is_slow else []
            yield pytest.param(page, id=page.name, marks=marks)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("page", parametrised_pages())
def test_the_blocks_of_a_page_run(page, tmp_path, stand_ins):
    run_page(page, tmp_path, stand_ins)


def written(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_blocks_share_names_and_folder(tmp_path, stand_ins):
    text = (
        "```python\nopen('a.txt', 'w').write('x')\nb = 2\n```\n\n<!-- setup: python\nb += 1\n-->\n"
        "```bash\ntest -f a.txt && test -f assets/sample_image.jpg\n```\n"
        "<!-- replace: b == 2 => b == 3 -->\n```python\nassert b == 2\n```\n"
    )
    page = read_page(written(tmp_path, text))
    assert page.counts() == {"run": 3}
    run_page(page, tmp_path, stand_ins)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\n1 / 0\n```", "page:6"),
        ("```bash\nfalse | true\n```", "page:6: this bash block failed"),
        ("```yaml\ntraining: {max_train_step: 3}\n```", "unknown key 'training.max_train_step'"),
        ("```yaml\na: [1\n```", "page:6: this yaml block failed"),
    ],
)
def test_a_failing_block_is_named(tmp_path, stand_ins, block, message):
    page = read_page(written(tmp_path, f"# Title\n```python\nb = 1\n```\n{block}\n"))
    with pytest.raises(DocsError, match=message):
        run_page(page, tmp_path, stand_ins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- skip: is long -->\n```python\n```\n", "'is long' is none of"),
        ("<!-- replace: a => b -->\n```python\nc\n```\n", "'a', which is to be replaced, is not"),
        ("<!-- replace: a -->\n```python\na\n```\n", "must be 'old => new'"),
        ("<!-- setup: perl\n-->\n", "setup must name one of"),
        ("<!-- skip: needs a GPU -->\n", "belongs to no block"),
        ("<!-- skip: needs a GPU -->\n```\ntext\n```\n", "a block that is not run"),
        ("```pyhton\n```\n", "'pyhton' is neither code nor text"),
    ],
)
def test_a_page_that_hides_something_is_refused(tmp_path, text, message):
    with pytest.raises(DocsError, match=message):
        read_page(written(tmp_path, text))
